"""The evidence: rows kept per arm and seed, paired differences, a verdict on each claim, and the page."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from tools.evidence import measure
from tools.evidence.arms import ARMS, CHANGES, CROSSED, DRIFT, MORE, OBJECTIVES, ONE_TASK, SHARES, Bench, Row, _changed
from tools.evidence.claims import CLAIMS, CONTRASTS, claims_of, figures_of, verdict_on
from tools.evidence.document import GRID, document, with_readme_line
from tools.evidence.figures import drawings


def rows_of(**arms: list[float]) -> dict[str, dict[int, Row]]:
    spent = {"sft": 3.0, "rollout": 2.0, "score": 2.0, "distill": 4.0}
    return {
        arm: {seed: Row(accuracy, 1 - accuracy, spent) for seed, accuracy in enumerate(accuracies, start=1)}
        for arm, accuracies in arms.items()
    }


def test_every_arm_can_be_made_and_every_claim_has_its_arms():
    everything = {*ARMS, *MORE}
    other = {"base", "sft", "trl_live", "opsa", "sft_more", "lora"}
    assert everything == set(CHANGES) | set(CROSSED) | set(SHARES) | other
    assert set(SHARES.values()) <= {(arm, part) for arm in ARMS for part in (2, 3, 4)}
    assert {claim.contrast for claim in CLAIMS} <= set(CONTRASTS)
    assert {arm for weights in CONTRASTS.values() for arm in weights} <= everything
    assert {arm for _, cells in GRID for arm in cells} <= everything
    assert set(OBJECTIVES) <= {arm for claim in CLAIMS for arm in CONTRASTS[claim.contrast]}, "each is judged"


def test_an_objective_changes_nothing_else_of_its_plan(tmp_path, world):
    bench = Bench("arithmetic", measure.service_of(tmp_path, world.settings), tmp_path)
    keys = ("estimator", "js_beta", "extrapolation", "horizon", "horizon_growth_steps", "token_weighting")

    def rest(arm):
        plan = bench.service.plan(_changed(bench.arguments(1), **CHANGES[arm]))
        own = plan.recipe.to_dict()
        return {key: own["distill"].pop(key, None) for key in (*keys, "entropy_share")}, own

    bases = {arm: rest(arm) for arm in set(OBJECTIVES.values())}
    for arm, base in OBJECTIVES.items():
        objective, others = rest(arm)
        assert others == bases[base][1], arm
        assert objective != bases[base][0], arm


def test_differences_are_paired_by_seed_and_decide_the_claims():
    rows = rows_of(lightning_sampled=[0.8, 0.7, 0.9], sft=[0.4, 0.3, 0.5], live_sampled=[0.79, 0.71], opsa=[0.5])
    figures = figures_of(rows)
    assert figures["arms"]["lightning_sampled"]["accuracy"] == [0.8, 0.7, 0.9]
    assert figures["arms"]["sft"]["processor_seconds"] == [11.0] * 3
    assert figures["paired"]["lightning_sampled - sft"]["accuracy"] == [0.4, 0.4, 0.4]
    assert figures["paired"]["lightning_sampled - live_sampled"]["seeds"] == [1, 2]
    assert "lightning_sampled - opsa" not in figures["paired"], "one seed has no interval"
    assert figures["students_per_cache"]["lightning_sampled"] == [8.0, 6.0, 4.8]
    claims = {claim["claim"]: claim for claim in claims_of({"arithmetic": figures})}
    improves = claims["Lightning OPD improves on its SFT student."]
    assert (improves["verdict"], improves["figures"]["seeds"]) == ("reproduced", 3)
    assert claims["The teacher's scores are better than none (OPSA as control)."]["verdict"] == "out of reach"
    assert {claim["verdict"] for claim in claims.values()} <= {"reproduced", "refuted", "out of reach"}
    assert improves["figures"]["means"] == {"lightning_sampled": 0.8, "sft": 0.4}
    page = document({"tasks": {"arithmetic": figures}, "claims": list(claims.values())}, "command")
    assert "| `lightning_sampled` | 3 | 0.800 [" in page
    assert (
        "**Lightning OPD improves on its SFT student.** arithmetic: reproduced (accuracy: `lightning_sampled`" in page
    )
    assert "Not measured: `base`, `lightning_topk`, `live_topk`, `trl_live`," in page
    assert "| own | own | 0.750 [" in page, "the grid's first cell is the live arm"
    assert "| `js_50` | `lightning_topk` | 0 | not measured | |" in page
    assert "Out of reach: no run here has such models." in page


def test_contrasts_of_more_than_two_arms_are_paired_by_seed():
    rows = rows_of(
        lightning_sampled=[0.8, 0.7], mismatched=[0.0, 0.1], live_sampled=[0.7, 0.6], live_mismatched=[0.5, 0.4]
    )
    paired = figures_of(rows | rows_of(repaired=[0.6, 0.6]))["paired"]
    more = paired["(lightning_sampled - mismatched) - (live_sampled - live_mismatched)"]
    assert more["accuracy"][0] == pytest.approx(0.5)
    assert paired["repaired - (lightning_sampled + mismatched) / 2"]["accuracy"][0] == pytest.approx(0.2)
    claims = {
        claim["claim"]: claim for claim in claims_of({"arithmetic": figures_of(rows), "chain_sum": figures_of({})})
    }
    assert claims["Lightning loses more by such a teacher than live."]["verdict"] == "out of reach", "two seeds differ"
    only = [claim for claim in claims_of({"chain_sum": figures_of(rows)}) if claim["figures"]]
    assert all(not ONE_TASK & CONTRASTS[claim["figures"]["contrast"]].keys() for claim in only)


def test_an_objective_that_loses_says_so():
    rows = rows_of(lightning_topk=[0.9, 0.91, 0.92], js_50=[0.7, 0.71, 0.72], js_90=[0.9, 0.91, 0.93])
    page = document({"tasks": {"arithmetic": figures_of(rows)}, "claims": []}, "command")
    assert "| `js_50` | `lightning_topk` | 3 | -0.200 [-0.200, -0.200] | **loses** |" in page
    assert "shows no difference beyond chance |" in page


def test_the_readmes_line_has_the_measured_figures():
    rows = rows_of(lightning_topk=[0.9, 0.8], live_topk=[0.7, 0.6])
    evidence = {"tasks": {"arithmetic": figures_of(rows)}}
    readme = with_readme_line("before <!-- evidence -->old<!-- /evidence --> after", evidence)
    assert "arithmetic, top-8: +0.200 [+0.200, +0.200] over 2 seeds" in readme
    assert "old" not in readme
    assert with_readme_line(readme, evidence) == readme


@pytest.mark.needs("matplotlib")
def test_figures_show_every_arm_and_are_the_same_each_time():
    rows = rows_of(lightning_sampled=[0.8, 0.7], rounds_2=[0.9, 0.8], horizon_10=[0.6, 0.5], lightning_third=[0.5, 0.6])
    drifted = {seed: Row(row.accuracy, 0.1, row.seconds, 0.5) for seed, row in rows["rounds_2"].items()}
    arms = figures_of(rows | {"rounds_2": drifted, "lora": drifted, "trl_live": drifted})["arms"]
    drawn = drawings("arithmetic", arms)
    assert set(drawn) == {"accuracy", "cost", "rounds", "horizon", "drift"}
    assert drawn == drawings("arithmetic", arms)
    for name in ("accuracy", "cost"):
        texts = {text.text for text in ElementTree.fromstring(drawn[name]).iter() if text.tag.endswith("text")}
        assert set(arms) <= texts
    assert drawings("chain_sum", {}) == {}


@pytest.mark.parametrize(
    ("kind", "interval", "verdict"),
    [
        ("better", [0.1, 0.05, 0.2], "reproduced"),
        ("better", [-0.1, -0.2, -0.05], "refuted"),
        ("better", [0.1, -0.1, 0.3], "out of reach"),
        ("alike", [0.0, -0.04, 0.04], "reproduced"),
        ("alike", [-0.2, -0.3, -0.1], "refuted"),
        ("alike", [-0.1, -0.3, 0.1], "out of reach"),
        ("cheaper", [-5.0, -8.0, -2.0], "reproduced"),
        ("cheaper", [5.0, 2.0, 8.0], "refuted"),
        ("worse", [-0.1, -0.2, -0.05], "reproduced"),
        ("better", None, "out of reach"),
    ],
)
def test_an_interval_decides_or_leaves_open(kind, interval, verdict):
    assert verdict_on(kind, interval) == verdict


def test_the_quick_part_writes_everything_and_goes_on_where_it_stopped(world, tmp_path, capsys, monkeypatch):
    arms = ["base", "sft", "lightning_sampled", "opsa"]
    monkeypatch.setattr("tools.evidence.arms.candidate_scores", with_a_divergence)
    call = ["--work", str(tmp_path / "work"), "--quick", "--arms", *arms]
    assert measure.main([*call, "--seeds", "1"], world.settings) == 0
    assert measure.main([*call, "--seeds", "1", "2"], world.settings) == 0
    told = capsys.readouterr().out.splitlines()
    assert sum("lightning_sampled" in line for line in told) == 3, "seed 1 was told twice and measured once"
    home = measure.service_of(tmp_path / "work", world.settings)
    assert home.list_runs().total == 4
    docs = tmp_path / "work" / "docs"
    evidence = json.loads((docs / "evidence.json").read_text())
    assert set(evidence["tasks"]["arithmetic"]["arms"]) == set(arms)
    assert evidence["tasks"]["arithmetic"]["arms"]["opsa"]["seeds"] == [1, 2]
    assert "quick part" in (docs / "evidence.md").read_text()
    (docs / "evidence.json").unlink()
    more = measure.main([*call, "--only-write", "--seeds", "1", "2", "3"], world.settings)
    assert (more, home.list_runs().total) == (0, 4), "nothing is measured"
    assert json.loads((docs / "evidence.json").read_text()) == evidence


def test_kept_rows_of_before_get_their_drift_from_the_workspace(world, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.evidence.arms.candidate_scores", with_a_divergence)
    bench = Bench("arithmetic", measure.service_of(tmp_path, world.settings), tmp_path, quick=True)
    row = bench.rows("lightning_sampled", 1)["lightning_sampled"]
    assert row.drift is None, "stand-in stages tell none"
    for file in (tmp_path / "home" / "artifacts" / "model").glob("*/training.json"):
        summary = json.loads(file.read_text())
        file.write_text(json.dumps(summary | {"final": {DRIFT: 0.25}}))
    assert bench.drifts() == {(row.accuracy, row.reverse_kl): 0.25}
    assert measure.kept(bench, ["lightning_sampled", "lora"], [1, 2]) == {
        "lightning_sampled": {1: replace(row, drift=0.25)},
        "lora": {},
    }


def with_a_divergence(result):
    """The scores of a run; stand-in stages measure no divergence and leave out references."""
    scores = {name: {"reverse_kl": [0.5, 0.4, 0.6], **score} for name, score in result["scores"].items()}
    return {"base": next(iter(scores.values())), **scores}


def test_a_cell_of_the_grid_and_a_share_of_the_steps_are_runs_of_their_own(world, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.evidence.arms.candidate_scores", with_a_divergence)
    bench = Bench("arithmetic", measure.service_of(tmp_path, world.settings), tmp_path, quick=True)
    row = bench.rows("repaired_swapped", 1)["repaired_swapped"]
    assert {"sft", "rollout", "score", "distill"} <= row.seconds.keys()
    bench.rows("lightning_topk_half", 1)
    halved, repaired = (bench.service.store.record(run.run_id).request for run in bench.service.list_runs().rows[:2])
    assert repaired.inputs.teacher.path.endswith("teacher_other_style")
    assert repaired.inputs.student.sft_teacher.identity.name == "teacher"
    assert (repaired.recipe.distill.repair, repaired.recipe.distill.steps) == ("residual", 4)
    assert (halved.recipe.distill.estimator, halved.recipe.distill.steps) == ("topk_reverse_kl", 2)
