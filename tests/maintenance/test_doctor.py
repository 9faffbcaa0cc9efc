"""What the doctor finds, and that it can be repaired."""

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


def test_a_damaged_index_says_what_to_do(service):
    list(service.store.index.runs())
    for file in service.workspace.root.glob("opd.sqlite*"):
        file.unlink()
    service.workspace.index.write_bytes(b"no database at all" * 100)
    check = found(service)["index"]
    assert not check.well
    assert "--repair" in check.fix


def test_a_wrong_setting_is_found(service):
    (service.workspace.root / "settings.toml").write_text("[quotas]\nmax_running_run = 1\n")
    check = found(service)["settings"]
    assert not check.well
    assert "max_running_run" in check.found
