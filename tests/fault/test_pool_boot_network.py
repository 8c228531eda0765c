"""The network of an isolated VM on a pool: its own, led nowhere, and taken away with it unless others are in it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.support.boot_calls import CALLS_MAX, EFFECTS, Site, point_of_web
from xbfs.instant.pool.plan import BootWishes
from xbfs.instant.pool.record import SESSION_KEY
from xbfs_engine.core.errors import ObjectNotFound, UsageError
from xbfs_engine.source.xapi.vm_record import RECORD_KEY

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs_engine.catalog.restore_point import RestorePoint


@pytest.fixture(scope="module")
def point(tmp_path_factory: pytest.TempPathFactory) -> RestorePoint:
    return point_of_web(tmp_path_factory.mktemp("point"))


def test_without_a_network_of_the_pool_the_vm_can_be_isolated(point: RestorePoint, tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound):
        Site(point, tmp_path, networks=())
    site = Site(point, tmp_path, BootWishes(isolated=True), networks=())
    site.boot()
    db = site.pool.db
    (network,) = networks_of(site)
    assert db.refs(network, "PIFs") == []
    assert network not in site.before
    assert db.mapping(site.vm, "blocked_operations") == {}
    with pytest.raises(UsageError):
        Site(point, tmp_path, BootWishes(disks=frozenset({7})))


def networks_of(site: Site) -> set[str]:
    return {site.pool.db.text(vif, "network") for vif in site.pool.db.refs(site.vm, "VIFs")}


def test_two_isolated_vms_do_not_see_each_other(point: RestorePoint, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("1", "2")]
    for path in paths:
        path.mkdir()
    first = Site(point, paths[0], BootWishes(isolated=True))
    first.boot()
    first.pool.files.clear()  # they are on its SR now
    other = Site(point, paths[1], BootWishes(isolated=True), pool=first.pool)
    other.boot()
    assert not networks_of(first) & networks_of(other)
    other.discard()
    other.check_clean()


def test_every_interface_of_an_isolated_vm_is_in_its_network(point: RestorePoint, tmp_path: Path) -> None:
    vm = dict(cast("dict[str, Any]", point.vm[RECORD_KEY]))
    first = vm["vifs"][0]
    second = {
        "vif": {**first["vif"], "device": "1", "MAC": "02:16:3e:00:00:99"},
        "network": {**first["network"], "uuid": "other", "name_label": "lab"},
    }
    both = replace(point, vm={RECORD_KEY: {**vm, "vifs": [first, {**first, **second}]}})
    site = Site(both, tmp_path, BootWishes(isolated=True))
    site.boot()
    assert len(site.pool.db.refs(site.vm, "VIFs")) == 2
    (network,) = networks_of(site)
    assert network not in site.before


def test_a_migrated_vms_network_is_not_the_sessions_any_more(point: RestorePoint, tmp_path: Path) -> None:
    site = Site(point, tmp_path, BootWishes(isolated=True))
    site.boot()
    site.migrate()  # and the session is thrown away: nobody comes back to the pool
    (network,) = networks_of(site)
    assert SESSION_KEY not in site.pool.db.mapping(network, "other_config")


@pytest.mark.parametrize("code", ["NETWORK_CONTAINS_PIF", "NETWORK_CONTAINS_VIF"])
def test_a_network_that_others_use_does_not_keep_the_sr(point: RestorePoint, tmp_path: Path, code: str) -> None:
    """Somebody gave it a PIF, or plugged an interface after we looked: it is theirs, as one with VIFs is."""
    site = Site(point, tmp_path, BootWishes(isolated=True))
    site.boot()
    site.pool.faults["network.destroy"] = [code]
    site.discard()
    (network,) = site.pool.everything().keys() - site.before.keys()
    assert site.pool.db.cls(network) == "network"
    assert SESSION_KEY not in site.pool.db.mapping(network, "other_config")


@pytest.mark.parametrize("effect", EFFECTS)
def test_an_isolated_vm_keeps_its_network_where_it_goes(point: RestorePoint, tmp_path: Path, effect: str) -> None:
    for nth in range(1, CALLS_MAX):
        site = Site(point, tmp_path, BootWishes(isolated=True))
        site.boot()
        struck = site.failing(nth, effect, site.migrate)
        site.migrate()
        site.discard()
        (network,) = networks_of(site)
        assert network not in site.before, (nth, site.pool.struck)
        assert SESSION_KEY not in site.pool.db.mapping(network, "other_config")
        if not struck:
            return
    pytest.fail("there is no end of calls")
