"""Settings keep the names of the records they fill."""
import dataclasses

import pytest

from stratfam.config import LimitSettings, load_config, show_config
from stratfam.core import ConfigError


def test_limits_fill_the_gates_records():
    from stratfam.risk.limits import limits_from
    s = load_config(overrides=["limits.stop_loss=0.03", "limits.take_profit=off"], environ={})
    limits = limits_from(**s.limits.model_dump())
    assert (limits.exits.stop_loss, limits.exits.take_profit) == (0.03, None)
    assert set(LimitSettings.model_fields) <= {f.name for part in (limits.position, limits.exits, limits.account) for f in dataclasses.fields(part)}


def test_costs_fill_the_accounts_record():
    account = pytest.importorskip("stratfam.market.account", reason="the market room has not landed")
    s = load_config(overrides=["costs.taker=0.0004"], environ={})
    assert account.Costs(**s.costs.model_dump()).taker == 0.0004


def test_notify_addresses_are_secrets_and_stay_hidden(tmp_path):
    "Token, chats and service addresses come from the environment or the file of secrets, and no face of the settings shows them."
    file = tmp_path / "secrets.toml"
    file.write_text('telegram_token = "123456:canary-token"\napprise_urls = "json://canary-host/canary-path"\n')
    file.chmod(0o600)
    s = load_config(environ={"STRATFAM_SECRETS": str(file), "STRATFAM_SECRETS_TELEGRAM_CHATS": "42,-7"}, overrides=["notify.log=off"])
    assert s.secrets.telegram_chats.get_secret_value() == "42,-7" and s.notify.log is None
    shown = show_config(s) + repr(s) + s.model_dump_json()
    assert "canary" not in shown and "42,-7" not in shown and 'log = "off"' in shown
    with pytest.raises(ConfigError, match="must not stand here"): load_config(environ={}, overrides=["secrets.telegram_token=a"])
