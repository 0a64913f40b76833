"""Settings keep the names of the records they fill."""
import dataclasses

import pytest

from stratfam.config import LimitSettings, load_config


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
