"""The evidence: rows kept per arm and seed, paired differences, a verdict on each claim, and the page."""

import json
from xml.etree import ElementTree

import pytest

from tools.evidence import measure
from tools.evidence.arms import ARMS, CHANGES, MISMATCHED, Row
from tools.evidence.claims import CLAIMS, PAIRS, claims_of, figures_of, verdict_on
from tools.evidence.document import document


def rows_of(**arms: list[float]) -> dict[str, dict[int, Row]]:
    spent = {"sft": 3.0, "rollout": 2.0, "score": 2.0, "distill": 4.0}
    return {
        arm: {seed: Row(accuracy, 1 - accuracy, spent) for seed, accuracy in enumerate(accuracies, start=1)}
        for arm, accuracies in arms.items()
    }


def test_every_arm_can_be_made_and_every_claim_has_its_pair():
    other = {"base", "sft", "trl_live", "opsa", "sft_more", "lora"}
    assert set(ARMS) == set(CHANGES) | set(MISMATCHED) | other
    assert {claim.pair for claim in CLAIMS} <= set(PAIRS)
    assert {arm for pair in PAIRS for arm in pair} <= set(ARMS)


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
    assert claims["The teacher's scores are better than none (OPSA)."]["verdict"] == "out of reach"
    assert {claim["verdict"] for claim in claims.values()} <= {"reproduced", "refuted", "out of reach"}
    page = document({"tasks": {"arithmetic": figures}, "claims": list(claims.values())}, "command")
    assert "| `lightning_sampled` | 3 | 0.800 [" in page
    assert "reproduced: Lightning OPD improves on its SFT student." in page


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
    for figure in ("accuracy", "cost"):
        drawing = ElementTree.parse(docs / f"evidence-arithmetic-{figure}.svg").getroot()
        assert len([part for part in drawing if part.tag.endswith("circle")]) == len(arms)


def with_a_divergence(result):
    """The scores of a run; stand-in stages measure no divergence and leave out references."""
    scores = {name: {"reverse_kl": [0.5, 0.4, 0.6], **score} for name, score in result["scores"].items()}
    return {"base": next(iter(scores.values())), **scores}
