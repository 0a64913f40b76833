"""pytorch-tcn's side of bench_learn, run by the Python of its own environment: reads numbers.npz from a folder, prints JSON on request.

Lines on standard input: `start none` or `start weight_norm` builds the networks from our weights and prints their Q-values, `update` times one
dueling double DQN update, `quit` ends.
"""
import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from pytorch_tcn import TCN

torch.set_num_threads(1)
given = {k: torch.as_tensor(v) for k, v in np.load(Path(sys.argv[1]) / "numbers.npz").items()}
BLOCKS = 1 + max(int(k.split(".")[3]) for k in given if k.startswith("features_extractor.tcn.blocks."))
CHANNELS, INPUTS, KERNEL = given["features_extractor.tcn.blocks.0.one.weight"].shape
# Our observations hold (W,F); a convolution wants (F,W)
turn = lambda x: x.view(len(x), -1, INPUTS).transpose(1, 2).contiguous()


class Net(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.tcn = TCN(INPUTS, [CHANNELS] * BLOCKS, kernel_size=KERNEL, dilations=[2**i for i in range(BLOCKS)], dropout=0.0,
                       use_norm=None if norm == "none" else norm, activation="relu", causal=True)
        L, H = given["advantage.weight"].shape
        self.body, self.value, self.advantage = torch.nn.Linear(CHANNELS, H), torch.nn.Linear(H, 1), torch.nn.Linear(H, L)

    def forward(self, x):
        h = torch.relu(self.body(self.tcn(x)[..., -1]))
        a = self.advantage(h)
        return self.value(h) + a - a.mean(dim=1, keepdim=True)


def fill(net):
    "Put our weights in; a convolution under weight norm takes them as they are, scaled by their own norm."
    put = lambda layer, name: [getattr(layer, k).data.copy_(given[f"{name}.{k}"]) for k in ("weight", "bias")]
    for i, b in enumerate(net.tcn.network):
        for theirs, ours in ((b.conv1, "one"), (b.conv2, "two"), (b.downsample, "skip")):
            if theirs is None: continue
            name = f"features_extractor.tcn.blocks.{i}.{ours}"
            if torch.nn.utils.parametrize.is_parametrized(theirs):
                theirs.weight = given[f"{name}.weight"]
                theirs.bias.data.copy_(given[f"{name}.bias"])
            else: put(theirs, name)
    for layer, name in ((net.body, "body.0"), (net.value, "value"), (net.advantage, "advantage")): put(layer, name)
    return net


def update():
    started = time.process_time()
    with torch.no_grad():
        chosen = online(later).argmax(dim=1, keepdim=True)
        aim = given["rewards"] + 0.8 * (1 - given["dones"]) * target(later).gather(1, chosen)
    loss = torch.nn.functional.smooth_l1_loss(online(now).gather(1, given["actions"]), aim)
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(online.parameters(), 10.0)
    optimiser.step()
    return time.process_time() - started


print(json.dumps({"version": importlib.metadata.version("pytorch-tcn")}), flush=True)
now, later = turn(given["observations"]), turn(given["next_observations"])
for line in sys.stdin:
    what, *rest = line.split()
    if what == "quit": break
    if what == "start":
        online, target = fill(Net(rest[0])), fill(Net(rest[0]))
        optimiser = torch.optim.Adam(online.parameters(), lr=1e-3, fused=True)
        with torch.no_grad(): print(json.dumps({"q": online(now).tolist()}), flush=True)
    else: print(json.dumps({"seconds": update()}), flush=True)
