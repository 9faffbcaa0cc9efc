"""A teacher that sees more than its student, in plans: what it sees, whose student it is, and when no SFT is needed."""

import json

import pytest

from opd_mcp.schemas.errors import ConsistencyError, DataError
from opd_mcp.schemas.requests import GenerateTeacherResponses
from opd_mcp.server.render.plans import plan_text

SYSTEM = {"prompting.teacher_system": "1;2"}
SKIP = {"sft.skip": True}
NEEDS_SFT = ["generate_responses", "sft", "rollout", "score", "distill", "benchmark"]


def names(plan):
    return [phase.name for phase in plan.phases]


def codes(findings):
    return [finding.code for finding in findings]


def keys(plan):
    return {phase.name: phase.key for phase in plan.phases}


@pytest.fixture
def hinted(world):
    """Prompts of which the teacher sees a hint as well."""

    def written(name, hint="3;"):
        rows = [
            {"prompt": f"1+{number}=?", "teacher_messages": [{"role": "user", "content": f"{hint}1+{number}=?"}]}
            for number in range(6)
        ]
        return world.file(f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    return written


def test_a_plan_shows_what_the_teacher_sees_and_names_it_in_the_teachers_identity(service, world, hinted):
    plan = service.plan(world.plan_arguments(prompts=hinted("hinted"), overrides=SYSTEM))
    assert names(plan) == NEEDS_SFT
    assert plan.blocking == []
    context = plan.consistency.teacher.context
    assert context.system is not None
    assert context.rows is not None
    assert plan.preview.prompts[0].teacher_text == "<assistant>1;2<user>3;1+0=?<assistant>"
    assert "of it the teacher sees: '<assistant>1;2<user>3;1+0=?<assistant>'" in plan_text(plan)


def test_what_the_teacher_sees_is_in_every_key_that_it_decides(service, world, hinted):
    plain, system = (service.plan(world.plan_arguments(overrides=given)) for given in ({}, SYSTEM))
    one, two = (service.plan(world.plan_arguments(prompts=hinted(name, name))) for name in ("1", "2"))
    for first, second in ((plain, system), (plain, one), (one, two)):
        decided = {"generate_responses", "sft", "score", "distill", "benchmark"}
        assert all(keys(first)[name] != keys(second)[name] for name in decided)


def test_sft_prompts_without_the_messages_that_the_prompts_have_block_the_plan(service, world, hinted):
    arguments = {"prompts": hinted("hinted"), "sft_prompts": world.prompts("sft")}
    plan = service.plan(world.plan_arguments(**arguments))
    assert codes(plan.blocking) == ["teacher_mismatch"]
    assert "`teacher_messages` in the SFT prompts" in plan.blocking[0].fix
    assert service.plan(world.plan_arguments(**arguments, allow_teacher_mismatch=True)).blocking == []
    assert service.plan(world.plan_arguments(**arguments | {"sft_prompts": hinted("too")})).blocking == []


def test_a_student_of_the_plain_teacher_is_not_one_of_the_teacher_with_its_context(service, world, sft_student):
    student = sft_student(world.teacher)
    assert service.plan(world.plan_arguments(student=student)).blocking == []
    plan = service.plan(world.plan_arguments(student=student, overrides=SYSTEM))
    assert codes(plan.blocking) == ["teacher_mismatch"]
    assert "answered with the student's prompts" in plan.blocking[0].message
    with pytest.raises(ConsistencyError, match="teacher_mismatch"):
        service.build_teacher_cache(world.cache_arguments(student, overrides=SYSTEM))


def test_a_declared_teacher_covers_what_it_sees(service, world):
    plan = service.plan(world.plan_arguments(declared_teacher=world.teacher, overrides=SYSTEM))
    assert plan.blocking == []
    assert (plan.consistency.status, plan.consistency.basis) == ("consistent", "asserted")


def test_a_student_that_is_its_teacher_needs_no_sft(service, world):
    for method, phases in (("lightning", NEEDS_SFT[2:]), ("live", NEEDS_SFT[4:])):
        plan = service.plan(world.plan_arguments(student=world.teacher, method=method, overrides=SYSTEM | SKIP))
        assert plan.blocking == []
        assert names(plan) == phases
        assert (plan.consistency.status, plan.consistency.basis) == ("consistent", "by_construction")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"overrides": SYSTEM | SKIP}, "not_one_model"),
        ({"same": True, "overrides": SKIP}, "nothing_to_learn"),
        ({"same": True, "method": "sft", "overrides": SYSTEM | SKIP}, "invalid_argument"),
        ({"same": True, "overrides": SYSTEM | SKIP | {"distill.adapter": {"quantization": "nf4"}}}, "not_one_model"),
    ],
)
def test_skipping_the_sft_is_refused_where_it_is_needed(service, world, changes, code):
    student = {"student": world.teacher} if changes.pop("same", False) else {}
    plan = service.plan(world.plan_arguments(**student, **changes))
    assert code in codes(plan.blocking)
    assert "'sft.skip'" in plan.blocking[0].fix or "teacher_system" in plan.blocking[0].fix


def test_a_template_without_system_prompts_blocks_one_for_the_teacher(service, world):
    teacher = world.copy_of(world.teacher, "teacher")
    template = teacher / "chat_template.jinja"
    template.write_text(template.read_text().replace("in messages %}", "in messages if message['role'] != 'system' %}"))
    plan = service.plan(world.plan_arguments(teacher=str(teacher), overrides=SYSTEM))
    assert "system_dropped" in codes(plan.blocking)


def test_keeping_right_responses_is_refused_without_answers_and_decides_the_key(service, world):
    keep = {"responses.keep": "right"}
    without = world.file("no-answers.jsonl", '{"prompt": "9+9=?"}\n')
    plan = service.plan(world.plan_arguments(sft_prompts=without, overrides=keep))
    assert codes(plan.blocking) == ["no_answers"]
    request = GenerateTeacherResponses(teacher=world.teacher, prompts=without, preset="demo", overrides=keep)
    with pytest.raises(DataError, match="no_answers"):
        service.generate_teacher_responses(request)
    plans = [
        service.plan(world.plan_arguments(overrides=keep | {"benchmark.answer_pattern": pattern}))
        for pattern in (r"#(\d+)", r"#(\d)")
    ]
    assert plans[0].blocking == []
    assert keys(plans[0])["generate_responses"] != keys(plans[1])["generate_responses"]


def test_a_teacher_known_by_name_alone_is_pointed_to_what_can_be_done_with_texts(service, world):
    plan = service.plan(world.plan_arguments(declared_teacher="gpt-5"))
    assert codes(plan.blocking) == ["teacher_mismatch"]
    assert "docs/guide/api-teachers.md" in plan.blocking[0].fix
    assert "Distill from gpt-5" not in plan.blocking[0].fix


@pytest.fixture
def panel(world):
    """Two teachers by domain, and prompts of both."""
    rows = [{"prompt": f"1+{n}=?", "teacher_domain": "styled" if n % 3 else "plain"} for n in range(6)]
    prompts = world.file("domains.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return {"teacher": {"plain": world.teacher, "styled": world.other_teacher}, "prompts": prompts}


def test_several_teachers_are_one_teacher_of_a_plan(service, world, panel):
    plan = service.plan(world.plan_arguments(**panel))
    assert plan.blocking == []
    assert names(plan) == NEEDS_SFT
    members = plan.inputs.teacher.members
    assert {domain: member.path for domain, member in members.items()} == panel["teacher"]
    assert plan.consistency.teacher.label().startswith("plain: teacher@")
    swapped = dict(zip(panel["teacher"], reversed(panel["teacher"].values()), strict=True))
    other = service.plan(world.plan_arguments(**panel | {"teacher": swapped}))
    assert keys(plan)["generate_responses"] != keys(other)["generate_responses"]
    assert keys(plan)["score"] != keys(other)["score"]


@pytest.mark.parametrize(
    ("changes", "code", "fix"),
    [
        ({"method": "live"}, "invalid_argument", "method='lightning'"),
        ({"overrides": {"score.engine": "http://127.0.0.1:9"}}, "invalid_argument", "Leave out 'score.engine'"),
        ({"overrides": {"distill.domain_weights": {"code": 2}}}, "invalid_argument", "`teacher_domain`"),
        ({"prompts": None}, "unknown_domain", "columns="),
    ],
)
def test_what_several_teachers_cannot_do_blocks_the_plan_with_a_way_out(service, world, panel, changes, code, fix):
    given = panel | changes
    given["prompts"] = given["prompts"] or world.prompts()
    plan = service.plan(world.plan_arguments(**given))
    found = [finding for finding in plan.blocking if finding.code == code]
    assert found, plan.blocking
    assert fix in found[0].fix


def test_a_named_field_says_which_teacher_it_is(service, world, panel):
    rows = [{"q": f"1+{n}=?", "kind": "styled" if n % 3 else "plain"} for n in range(6)]
    prompts = world.file("kinds.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "q", "teacher_domain": "kind"}
    assert service.plan(world.plan_arguments(**panel | {"prompts": prompts, "columns": columns})).blocking == []


def test_a_student_of_one_of_two_teachers_is_a_mismatch(service, world, panel, sft_student):
    plan = service.plan(world.plan_arguments(**panel, student=sft_student(world.teacher)))
    assert codes(plan.blocking) == ["teacher_mismatch"]
    request = GenerateTeacherResponses(teacher=panel["teacher"], prompts=world.prompts(), preset="demo")
    with pytest.raises(DataError, match="unknown_domain"):
        service.generate_teacher_responses(request)
