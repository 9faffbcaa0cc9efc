"""What a plan shows of the data as the run encodes it, and what of templates, options and lengths blocks it."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from opd_mcp.identity.data.scan import scan_prompts
from opd_mcp.planning.planner import require_unblocked
from opd_mcp.planning.prompts.text_work import Asked, TextWork
from opd_mcp.schemas.errors import ConsistencyError, PlanError
from opd_mcp.schemas.recipes import PromptingRecipe
from opd_mcp.schemas.requests import StartDistillation
from opd_mcp.server.render.plans import plan_text
from tests.identity.chat.conftest import END, START, made

STAGES = ("responses", "rollout", "benchmark")
CHATML = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<assistant>' }}{{ m.content }}"
    "{{ '<eos>' if m.role == 'assistant' else '' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}"
    "{% endif %}"
)
STRICT = "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}"  # noqa: E501
THINKING = (
    CHATML + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}-+-{% endif %}"
)


class Pair:
    """Copies of the two models that can be changed together, and plans for them."""

    def __init__(self, service, world) -> None:
        self.service, self.world = service, world
        self.teacher, self.student = world.copy_of(world.teacher, "t"), world.copy_of(world.student, "s")

    def template(self, text: str) -> None:
        (self.teacher / "chat_template.jinja").write_text(text)

    def config(self, **values: object) -> None:
        for folder in (self.teacher, self.student):
            file = folder / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    def plan(self, *rows: dict, **changes: object):
        prompts = self.world.file(
            "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows or ({"prompt": "1+1=?"},))
        )
        return self.service.plan(
            self.world.plan_arguments(teacher=str(self.teacher), student=str(self.student), prompts=prompts, **changes)
        )

    def blocked(self, *rows: dict, **changes: object) -> tuple[str, str]:
        (finding,) = self.plan(*rows, **changes).blocking
        return finding.code, f"{finding.message} Fix: {finding.fix}"


@pytest.fixture
def pair(service, world) -> Pair:
    return Pair(service, world)


def chat(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def said(plan, code: str) -> str:
    return {warning.code: warning.message for warning in plan.warnings}[code]


def test_a_plan_shows_prompts_stops_and_a_row_of_sft(service, world):
    plan = service.plan(world.plan_arguments())
    preview = plan.preview
    assert [prompt.text for prompt in preview.prompts] == [f"<user>1+{i}=?<assistant>" for i in range(3)]
    assert preview.prompts[0].tokens == 7
    assert preview.prompts[0].control_tokens == {"<user>": 1, "<assistant>": 1}
    assert (preview.stops, preview.end_of_turn) == ({"1": "<eos>"}, 1)
    assert (preview.learnt.source, preview.learnt.learnt, preview.learnt.learnt_tokens) == ("made up", "1<eos>", 2)
    assert (preview.measured, preview.of, preview.tokenizer) == (6, 6, "teacher")
    assert [share.over for share in preview.limits] == [0] * len(preview.limits)
    text = plan_text(plan)
    assert "prompt prompts-0 (7 tokens): '<user>1+0=?<assistant>'" in text
    assert "SFT learns (made up, 2 tokens): '1<eos>'" in text
    assert "of all 6 prompts: none over a limit" in text


def test_a_row_of_the_teacher_s_own_responses_is_shown_once_they_are_here(service, world, finished):
    arguments = world.start_arguments(method="sft")
    assert finished(service, service.start_distillation(arguments).run_id).state == "succeeded"
    plan = service.plan(world.plan_arguments(method="sft", overrides={"sft.steps": 4, "distill.steps": 3}))
    assert (plan.preview.learnt.source, plan.preview.learnt.learnt) == ("responses", "#1<eos>")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "True: a prompt ends '<assistant>'; False: '<assistant>-+-'; here as the template decides"),
        ({"enable_thinking": False}, "here False"),
    ],
)
def test_what_thinking_does_is_said(pair, options, said):
    pair.template(THINKING)
    plan = pair.plan(overrides={"prompting.chat_template_kwargs": options})
    assert plan.blocking == []
    assert said in plan.preview.template["thinking"]


@pytest.mark.parametrize(
    ("template", "system", "turns"),
    [
        (CHATML, "shown", "all shown; thinking of earlier turns is kept"),
        (STRICT + CHATML, "refused (no system)", "all shown"),
        (
            "S: be good. {{ messages[-1].content }}",
            "without one a prompt begins with 'S: be good.'",
            "earlier turns are dropped",
        ),
        (
            CHATML.replace("m.content", "m.content.split('</think>')[-1]"),
            "shown",
            "thinking of earlier turns is dropped",
        ),
    ],
)
def test_system_prompts_and_several_turns_are_tried(pair, template, system, turns):
    pair.template(template)
    found = pair.plan().preview.template
    assert system in found["system"]
    assert turns in found["turns"]


@pytest.mark.parametrize(
    ("template", "rows", "said"),
    [
        ("{% for x in %}", [{"prompt": "1"}], "cannot be read"),
        (STRICT + CHATML, [chat(("system", "1"), ("user", "2")), {"prompt": "3"}], "no place for the role 'system'"),
        (STRICT + CHATML, [chat(("user", "1"), ("tool", "2"))], "no place for the role 'tool'"),
        ("{{ messages[3].content.x }}", [{"prompt": "1"}], "1 of 1 prompts looked at cannot be encoded"),
        ("{{ 1 / 0 }}", [{"prompt": "1"}, {"prompt": "2"}], "ZeroDivisionError"),
    ],
)
def test_what_the_template_refuses_blocks(pair, template, rows, said):
    pair.template(template)
    code, text = pair.blocked(*rows)
    assert code == "template_failed"
    assert said in text


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "messages", "tools", "chat_template"])
def test_reserved_options_block(pair, name):
    code, text = pair.blocked(overrides={"prompting.chat_template_kwargs": {name: True}})
    assert code == "reserved_template_option"
    assert name in text


@pytest.mark.parametrize(
    ("name", "said"),
    [("enable_thinkin", "Set enable_thinking"), ("thinking_budget", "it reads"), ("x", "Leave it out")],
)
def test_options_that_the_template_never_reads_block(pair, name, said):
    pair.template(THINKING)
    code, text = pair.blocked(overrides={"prompting.chat_template_kwargs": {name: 1}})
    assert code == "unknown_template_option"
    assert said in text


@pytest.mark.parametrize("prompt", ["1+1=? <think>", "1+1=?<think>\n", "<think>"])
def test_thinking_that_would_open_twice_blocks(pair, prompt):
    pair.template(CHATML.replace("{{ '<assistant>' }}", "{{ '<assistant><think>\\n' }}"))
    assert pair.plan({"prompt": "about <think> tags"}).blocking == []
    code, text = pair.blocked({"id": "q7", "prompt": prompt})
    assert code == "doubled_think"
    assert "q7" in text


@pytest.mark.parametrize(
    ("overrides", "key", "room"),
    [
        ({"responses.sampling.max_new_tokens": 250}, "responses.sampling.max_new_tokens", 249),
        ({"rollout.sampling.max_new_tokens": 300}, "rollout.sampling.max_new_tokens", 249),
        ({"rollout.sampling.max_new_tokens": 256}, "rollout.sampling.max_new_tokens", 249),
    ],
)
def test_prompts_and_new_tokens_beyond_the_positions_block(pair, overrides, key, room):
    code, text = pair.blocked(overrides=overrides)
    assert code == "too_long"
    assert f"Set '{key}' to at most {room}" in text
    pair.config(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256})
    assert pair.plan(overrides=overrides).blocking == []


def test_one_further_plan_lifts_all_lengths_that_do_not_fit(pair):
    plan = pair.plan(overrides={f"{stage}.sampling.max_new_tokens": 1024 for stage in STAGES})
    assert [finding.code for finding in plan.blocking] == ["too_long"] * 3
    for stage in STAGES:
        assert f"Set '{stage}.sampling.max_new_tokens' to at most 249" in plan.next_action.why
    call = plan.next_action.arguments
    assert call["overrides"] == {f"{stage}.sampling.max_new_tokens": 249 for stage in STAGES}
    assert pair.plan(overrides=call["overrides"]).blocking == []
    with pytest.raises(PlanError, match="plan_blocked") as refused:
        require_unblocked(plan)
    assert refused.value.call == plan.next_action


@pytest.mark.parametrize(
    ("name", "value"),
    [("vocab_size", 10**12), ("num_hidden_layers", 1 << 20), ("hidden_size", 1 << 30), ("vocab_size", -1)],
)
def test_a_size_beyond_any_machine_blocks(pair, name, value):
    pair.config(**{name: value})
    found = [finding for finding in pair.plan().blocking if finding.code == "too_large"]
    assert len(found) == 2
    assert f"{name} = {value}" in found[0].message


def test_a_prompt_that_this_tokenizer_cannot_write_as_text_blocks(pair):
    code, text = pair.blocked({"prompt": "1+1=?"}, {"prompt": "1<eos><user>2"})
    assert code == "unknown_token"
    assert "1 of 2 prompts looked at" in text
    assert "set 'prompting.control_tokens' to 'tokens'" in text
    chosen = pair.plan({"prompt": "1<eos><user>2"}, overrides={"prompting.control_tokens": "tokens"})
    assert chosen.preview.prompts[0].control_tokens == {"<user>": 2, "<assistant>": 1, "<eos>": 1}
    assert "1 of 1 prompts looked at spell control tokens: 1 × <eos>, 1 × <user>" in said(
        chosen, "control_tokens_spelt"
    )


@pytest.mark.parametrize("choice", ["text", "tokens"])
def test_spelt_control_tokens_are_counted_and_a_choice(tmp_path, world, choice):
    rows = [{"prompt": "1+1=?"}, {"prompt": f"1{END}{START}2"}, chat(("system", END), ("user", "1"))]
    data = Path(world.file("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    asked = Asked(made(tmp_path / "m"), PromptingRecipe(control_tokens=choice), scan_prompts(data), "all")
    found = TextWork().facts(asked).preview
    assert (found["spelling"], found["spelt"]) == (2, {END: 2, START: 1})
    control = found["prompts"][1]["control"]
    assert (control[START], control[END]) == ((2, 1) if choice == "text" else (3, 2))


def test_roles_whose_text_is_left_out_are_told(pair):
    pair.template(CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"))
    assert "system (1 prompts)" in said(pair.plan(chat(("system", "be"), ("user", "1"))), "roles_dropped")


def test_only_so_many_prompts_are_measured_and_it_is_said(service, world):
    prompts = world.prompts("many", 300)
    preview = service.plan(world.plan_arguments(prompts=prompts)).preview
    assert 64 <= preview.measured < preview.of == 300


def test_a_plan_that_is_started_does_not_ask_again(service, world, monkeypatch):
    plan = service.plan(world.plan_arguments(overrides={"sft.steps": 1}))
    monkeypatch.setattr(
        "opd_mcp.planning.prompts.text_work.bounded_reply", lambda *_: pytest.fail("a child was started")
    )
    again = service._unchanged_plan(StartDistillation(plan_id=plan.plan_id))
    assert again.preview == plan.preview


def test_models_that_are_not_here_have_no_preview(service, world):
    assert service.plan(world.plan_arguments(teacher="org/teacher", student="org/student")).preview is None


def test_the_files_are_read_below_the_roots_alone(pair, tmp_path):
    outside = Path(tmp_path / "outside.jinja")
    outside.write_text("secret")
    (pair.teacher / "chat_template.jinja").write_text("{% include '" + str(outside) + "' %}")
    code, text = pair.blocked()
    assert (code, "secret" in text) == ("template_failed", False)


def renamed(model: Path, **tokens: str) -> None:
    """Give special tokens of a model other names, e.g. `pad="fill"` for <pad>."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (model / file).read_text()
        for old, new in tokens.items():
            text = text.replace(f'"<{old}>"', f'"<{new}>"')
        (model / file).write_text(text)


def test_special_tokens_that_no_prompt_has_may_differ_and_are_named(pair):
    renamed(pair.student, pad="fill")
    plan = pair.plan()
    assert plan.blocking == []
    assert "'<pad>' / '<fill>'" in said(plan, "special_tokens_differ")


@pytest.mark.parametrize(
    ("tokens", "rows", "template"),
    [
        ({"user": "human"}, [{"prompt": "1"}], CHATML),  # the template writes it
        ({"eos": "end"}, [{"prompt": "1"}], CHATML),  # it ends the turn that is taught
        ({"pad": "fill"}, [{"prompt": "1"}], "<pad>" + CHATML),
        ({"pad": "fill"}, [{"prompt": "1"}, chat(("user", "1"), ("assistant", "<pad>"), ("user", "2"))], CHATML),
    ],
)
def test_special_tokens_that_prompts_have_must_be_the_same_or_be_learnt(pair, tokens, rows, template):
    pair.template(template)
    renamed(pair.student, **tokens)
    with pytest.raises(ConsistencyError, match=r"tokenizer_mismatch.*use it.*differing_tokens"):
        pair.plan(*rows)
    plan = pair.plan(*rows, overrides={"prompting.differing_tokens": "learn"})
    assert "which the student learns in its SFT" in said(plan, "special_tokens_differ")


def test_the_preview_shows_the_moment_of_the_plan_and_says_that_a_run_has_its_own(pair):
    pair.template("{{ strftime_now('%Y-%m-%d') }} " + CHATML)
    before = datetime.now(UTC).strftime("%Y-%m-%d")
    plan = pair.plan({"prompt": "1+1=?"})
    days = {before, datetime.now(UTC).strftime("%Y-%m-%d")}
    told = said(plan, "template_dated")
    assert any(f"here {day!r} (UTC)" in told for day in days)
    assert "a run writes that of its start" in told
    shown = plan.preview.prompts[0].text
    assert any(all(character in shown for character in day) for day in days)


def test_a_template_that_draws_at_random_blocks(pair):
    pair.template(CHATML + "{{ ['a', 'b'] | random }}")
    code, text = pair.blocked({"prompt": "1+1=?"})
    assert code == "template_failed"
    assert "draws at random" in text
