"""What the doctor finds, and that it can be repaired."""

import sqlite3
from contextlib import closing

from opd_mcp.maintenance.doctor import checks


def found(service):
    return {check.name: check for check in checks(service)}


def test_a_good_set_up_is_well(service):
    bad = [check for check in checks(service) if not check.well]
    assert not bad


def test_a_run_that_is_not_indexed_is_found_and_repaired(world, service, busy_machine):
    run_id = service.start_distillation(world.start_arguments()).run_id
    with service.store.index.writing() as database:
        database.execute("DELETE FROM runs")
    check = found(service)["index"]
    assert not check.well
    assert "--repair" in check.fix
    service.store.rebuild()
    assert found(service)["index"].well
    service.cancel(run_id)


def test_a_damaged_index_is_made_anew_and_one_of_a_later_version_says_what_to_do(world, service, busy_machine):
    run_id = service.start_distillation(world.start_arguments()).run_id
    service.workspace.index.write_bytes(b"no database at all" * 100)
    assert found(service)["index"].well
    assert [row.run_id for row in service.list_runs().rows] == [run_id]
    service.cancel(run_id)
    with closing(sqlite3.connect(service.workspace.index)) as database:
        database.execute("PRAGMA user_version = 99")
    check = found(service)["index"]
    assert not check.well
    assert "later version" in check.found


def test_a_wrong_setting_is_found(service):
    (service.workspace.root / "settings.toml").write_text("[quotas]\nmax_running_run = 1\n")
    check = found(service)["settings"]
    assert not check.well
    assert "max_running_run" in check.found
