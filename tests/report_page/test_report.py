"""The report of a run, opened in a real browser: what it shows, what it refuses to run, and how it reads everywhere."""

import io
import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import report
from fleet.errors import UsageError
from fleet.report.rollouts import MAX_GROUPS, MAX_THUMBNAILS
from fleet.report.tables import Cell, evaluation_rows
from fleet.run_folder import read_jsonl
from report import write_report
from tests.report_page.pages import (
    HOSTILE,
    OUTCOMES,
    READ_CONTRASTS,
    READ_OVERFLOWS,
    estimate,
    evaluation,
    group_line,
    look_line,
    metrics_line,
    write_full_run,
    write_lines,
    write_run,
    write_thumbnails,
)

EMPTY_SENTENCES = {
    "curves": "No figures: metrics.jsonl holds no logged step yet.",
    "evaluation": "This run has no evaluations",
    "rollouts": "This run recorded no rollouts.",
}


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    return write_full_run(tmp_path_factory.mktemp("runs") / "full run")


@pytest.fixture(scope="module")
def full_report(full_run):
    return write_report(full_run)


def groups_of(run: Path, outcome: str = "", step: str = "") -> list[dict]:
    lines = [json.loads(line) for line in (run / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        line
        for line in lines
        if step in ("", str(line["step"]))
        and (not outcome or outcome in [rollout["outcome"] for rollout in line["rollouts"]])
    ]


def test_opens_from_disk_without_a_complaint_or_a_request(visit, full_report):
    shown = visit(full_report)
    shown.walk()
    assert shown.complaints == []
    assert [url for url in shown.requests if not url.startswith("data:image/webp;base64,")] == [full_report.as_uri()]


def test_filters_show_what_the_records_say(visit, full_run, full_report):
    shown = visit(full_report)
    for outcome in ("", "correct", "wrong_index", "index_out_of_range", "unparsable"):
        for step in ("", "30", "40"):
            shown.choose(outcome, step)
            wanted = groups_of(full_run, outcome, step)
            assert shown.texts("#count") == [f"{len(wanted)} of 13 groups shown"]
            assert shown.page.locator("#pager").is_hidden() == (len(wanted) <= 10)
            found = shown.walk()
            assert [group["place"] for group in found] == [
                f"step {line['step']}, group {line['group']}" for line in wanted
            ]
            assert [group["outcomes"] for group in found] == [
                [rollout["outcome"] for rollout in line["rollouts"]] for line in wanted
            ]


def test_every_picture_loads_and_a_missing_one_says_so(visit, full_report):
    groups = visit(full_report).walk()
    assert [group["widths"] for group in groups if group["place"] != "step 30, group 0"] == [[16, 16, 16]] * 12
    (odd,) = [group for group in groups if group["place"] == "step 30, group 0"]
    assert odd["widths"] == [16]
    assert odd["placeholders"] == ["picture missing"] * 2


def test_markup_in_records_is_shown_as_text_and_never_run(visit, full_report):
    shown = visit(full_report)
    shown.choose(step="30")
    heading = shown.page.locator("#groups h3").evaluate("(element) => element.textContent")
    completions = shown.page.locator("#groups pre").evaluate_all("(all) => all.map((pre) => pre.textContent)")
    labels = shown.page.locator("#groups figcaption").evaluate_all("(all) => all.map((one) => one.textContent)")
    header = shown.page.locator("main > header").evaluate("(element) => element.textContent")
    assert "training.py --output_dir " in header and HOSTILE[1].split("=")[0] in header and HOSTILE[2] in header
    assert heading == HOSTILE[2]
    assert completions == HOSTILE
    assert HOSTILE[1] in labels[0] and HOSTILE[0] in labels[2]
    assert shown.page.evaluate("[typeof wasHacked, document.scripts.length]") == ["undefined", 2]


def test_policy_stops_any_script_but_its_own_and_any_picture_from_elsewhere(visit, full_report):
    shown = visit(full_report)
    shown.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'wasHacked = 1'}))"
    )
    shown.page.evaluate("document.body.append(Object.assign(new Image(), {src: 'https://fleet.invalid/x.png'}))")
    while len([text for text in shown.complaints if "Content Security Policy" in text]) < 2:
        shown.page.wait_for_event("console")
    assert shown.page.evaluate("typeof wasHacked") == "undefined"


def test_figures_equal_the_evaluations(visit, full_run, full_report):
    shown = visit(full_report)
    documents = {document["step"]: document for document in read_jsonl(full_run / "evaluations.jsonl")}
    assert shown.texts("#evaluation-table thead th") == [
        "",
        *(f"{at}\nn = 512" for at in ("step 0", "step 20", "step 40", "separate")),
    ]
    rows = {re.split(r"\n", text)[0]: text for text in shown.texts("#evaluation-table tbody th")}
    cells = [re.split(r"\s*\n\s*", text) for text in shown.texts("#evaluation-table tbody td")]
    table = {name: cells[4 * k : 4 * k + 4] for k, name in enumerate(rows)}
    paths = {
        "Greedy accuracy": ("greedy_accuracy",), "Sampled accuracy": ("sampled_accuracy",),
        "pass@1": ("pass_at_k", "1"), "pass@4": ("pass_at_k", "4"),
        "Control: blank images": ("controls", "blank_images"),
        "Control: swapped images": ("controls", "swapped_images"),
        "Control: permuted order": ("controls", "permuted_order"),
        "Control: redrawn images": ("controls", "redrawn_images"),
    }  # fmt: skip
    assert set(table) == {*paths, "Chance", "Best constant choice"}
    assert [[text for text in cell if text] for cell in table["Chance"]] == [["33.3%"]] * 4  # exact: no interval
    for name, path in paths.items():
        for step, (value, interval) in zip((0, 20, 40, None), table[name], strict=True):
            wanted = documents[step]
            for key in path:
                wanted = wanted[key]
            low, high = wanted["ci95"]
            assert (value, interval) == (f"{100 * wanted['value']:.1f}%", f"{100 * low:.1f}–{100 * high:.1f}"), name
    assert table["Best constant choice"] == [["35.7%", "always 2"]] * 4
    assert shown.texts("#by-choice-table td")[8:] == ["90.0%\n86.9–92.8"] * 4
    assert [text.strip() for text in shown.texts("#by-choice-table td")[4:8]] == ["–"] * 4
    assert shown.texts("#heat-map td") == ["190", "11", "7", "2", "0", "0", "0", "0", "9", "8", "155", "0"]
    figures = dict(zip(shown.texts(".tile p:first-child"), shown.texts(".tile .figure"), strict=True))
    assert figures == {
        "Held-out greedy accuracy": "25.0% → 91.7%",
        "Chance": "33.3%",
        "Best constant choice": "35.7%",
        "Steps": "40",
        "Training": "50 s",  # 30 + 39 x 0.5 = 49.5
    }


def test_curves_are_named_and_say_where_they_end(visit, full_report):
    shown = visit(full_report)
    titles = shown.page.locator(".chart h3").evaluate_all("(all) => all.map((h3) => h3.firstChild.textContent.trim())")
    assert titles == [
        "Reward",
        "Accuracy",
        "Does it look?",
        "Outcomes",
        "Parse statuses",
        "Groups",
        "Choices made",
        "Entropy",
        "Gradient norm",
        "Step time",
    ]
    # the last two of 40 steps: (39/40 + 40/40) / 2
    assert shown.page.locator(".chart", has_text="Accuracy").first.inner_text().count("98.8%") == 2
    legends = {title: shown.page.locator(".chart", has_text=title).locator(".legend") for title in titles}
    assert legends["Parse statuses"].inner_text().split("\n") == ["ok", "75.0%", "no call", "25.0%"]
    assert legends["Choices made"].inner_text().split("\n")[-2:] == ["none of them", "25.0%"]
    assert "1 above the frame, up to 30" in shown.page.locator(".chart", has_text="Step time").inner_text()


def test_the_look_curve_says_what_it_means(visit, full_report, tmp_path):
    chart = visit(full_report).page.locator(".chart", has_text="Does it look?")
    assert "32 held-out episodes, 95% intervals" in chart.locator("h3").inner_text()
    assert chart.locator(".legend").inner_text().split("\n")[:6] == [
        "right, true pictures", "96.9%", "follows a swapped picture", "75.0%", "right, every picture grey", "25.0%",
    ]  # fmt: skip
    assert "chance" in chart.locator(".legend").inner_text()
    assert "near chance on grey ones" in chart.inner_text() and "without looking" not in chart.inner_text()
    blind = write_run(tmp_path / "blind", num_steps=2)
    lines = [look_line(0, 0.25, 0.25), look_line(1, 0.9, 0.9, True), {**look_line(2, 1.0, 1.0, True)}]
    del lines[2]["control/swapped"]
    write_lines(blind / "metrics.jsonl", lines)
    said = visit(write_report(blind)).page.locator(".chart", has_text="Does it look?").inner_text()
    assert "Gained without looking at 2 of 3 points, first at step 1." in said


@pytest.mark.parametrize("step", ["", "30"])
def test_fits_a_phone(visit, full_report, step):
    shown = visit(full_report, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    shown.choose(step=step)
    shown.page.locator("summary").click()
    assert shown.page.evaluate("document.documentElement.scrollWidth") == 360
    assert shown.page.evaluate(READ_OVERFLOWS) == []
    sizes = shown.page.locator(".chart svg text").evaluate_all(
        "(all) => all.map((t) => t.getBoundingClientRect().height)"
    )
    assert min(sizes) >= 9


def test_reads_well_in_the_light_and_in_the_dark(visit, full_report):
    bodies = []
    for scheme in ("light", "dark"):
        shown = visit(full_report, color_scheme=scheme)
        shown.page.locator("summary").click()
        contrasts = shown.page.evaluate(READ_CONTRASTS)
        assert len([text for text in contrasts if text["isDrawn"]]) > 50
        assert [text for text in contrasts if text["ratio"] < 4.5] == []
        style = shown.page.evaluate(
            "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
        )
        shot = io.BytesIO(shown.page.locator(".chart svg").first.screenshot())
        corner = Image.open(shot).convert("L").crop((2, 2, 3, 3)).tobytes()[0]
        assert (corner > 200) == (scheme == "light"), "the drawing has a background of its own"
        bodies.append(style)
    (light_ink, light_page), (dark_ink, dark_page) = bodies
    assert light_ink != dark_ink and light_page != dark_page


def test_drawings_take_every_colour_from_the_page(full_report):
    drawings = re.findall(r"<svg.*?</svg>", full_report.read_text(encoding="utf-8"), flags=re.DOTALL)
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", "".join(drawings)))
    assert len(drawings) == 10 and len(colours) > 8
    assert {colour for colour in colours if not re.fullmatch(r"var\(--[a-z-]+\d?\)", colour)} == {"none"}


def test_right_picture_is_framed_and_says_so(visit, full_report):
    shown = visit(full_report)
    framed = shown.page.locator("#groups .candidate.right figcaption").all_inner_texts()
    assert framed[:2] == ["1 red circle\nright\npicked 4×", "1 red circle\nright\npicked 1×"]
    assert len(framed) == shown.page.locator("#groups .group").count() == 10


def test_works_by_keyboard(visit, full_report):
    shown = visit(full_report)
    shown.page.locator("#outcomes input").first.focus()
    shown.page.keyboard.press("ArrowRight")
    assert shown.page.evaluate("document.activeElement.value") == "correct"
    assert shown.texts("#count") == ["9 of 13 groups shown"]
    shown.page.keyboard.press("Tab")
    assert shown.page.evaluate("document.activeElement.id") == "step"
    alts = shown.page.locator("#groups img").evaluate_all("(all) => all.map((image) => image.alt)")
    assert alts[:2] == ["candidate 0: blue square", "candidate 1: red circle, the right one"]
    assert shown.page.locator("svg:not([aria-label])").count() == 0


def test_without_javascript_all_but_the_rollouts_is_there(visit, full_report):
    shown = visit(full_report, java_script_enabled=False)
    assert shown.page.locator("noscript p").is_visible()
    assert shown.page.locator("#toolbar").is_hidden() and shown.page.locator("#pager").is_hidden()
    assert shown.page.get_by_text("25.0% → 91.7%").is_visible()
    assert shown.page.locator(".chart svg").count() == 10


def test_empty_run_says_what_is_missing(visit, tmp_path):
    shown = visit(write_report(write_run(tmp_path / "run")))
    for section, sentence in EMPTY_SENTENCES.items():
        assert sentence in shown.page.locator(f"#{section}").inner_text()
    assert shown.page.locator("svg, table, #toolbar").count() == 0
    assert shown.complaints == []


def test_run_without_evaluations_shows_training_and_its_own_picks(visit, tmp_path):
    run = write_run(tmp_path / "run", num_steps=3)
    write_lines(run / "rollouts.jsonl", [group_line(1, 0, ["right", "wrong", "far", "prose"], [])])
    shown = visit(write_report(run))
    assert "33.3% → 66.7%" in shown.texts(".figure")
    assert shown.texts("#heat-map td") == ["0", "0", "0", "0", "0", "1", "1", "2", "0", "0", "0", "0"]
    assert EMPTY_SENTENCES["evaluation"] in shown.page.locator("#evaluation").inner_text()
    assert shown.complaints == []


def test_null_figures_and_a_torn_last_line_are_passed_over(visit, tmp_path):
    run = write_run(tmp_path / "run")
    line = metrics_line(2, 0.5) | {"reward": None, "entropy": None, "outcome/correct": None}
    text = json.dumps(metrics_line(1, 0.25)) + "\n" + json.dumps(line) + "\n" + json.dumps(metrics_line(3, 0.9))[:70]
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    shown = visit(write_report(run))
    assert "25.0% → 37.5%" in shown.texts(".figure")
    assert shown.page.locator(".chart", has_text="Reward").locator("header b").inner_text() == "0.25"
    assert "NaN" not in shown.page.content() and shown.complaints == []


def test_run_stopped_after_its_first_evaluation_shows_it(visit, tmp_path):
    run = write_run(tmp_path / "run")
    write_lines(run / "evaluations.jsonl", [evaluation(0, 0.25)])
    shown = visit(write_report(run))
    assert shown.texts(".chart h3") == ["Accuracy share of right answers"]
    assert "25.0%" in shown.texts(".figure")


def test_step_with_a_null_share_is_left_out_of_the_stack(visit, tmp_path):
    run = write_run(tmp_path / "run")
    write_lines(run / "metrics.jsonl", [metrics_line(1, 0.25), metrics_line(2, 0.75) | {"outcome/correct": None}])
    shown = visit(write_report(run))
    legend = shown.page.locator(".chart", has_text="Outcomes").locator(".legend")
    assert legend.inner_text().split("\n") == ["correct", "25.0%", "wrong index", "75.0%"]


def test_run_longer_than_a_curve_has_points_ends_at_its_last_steps(visit, tmp_path):
    shown = visit(write_report(write_run(tmp_path / "run", num_steps=1300)))
    # the last 65 of 1300 steps: 1 - 32 / 1300
    assert shown.page.locator(".chart", has_text="Reward").locator("header b").inner_text() == "0.975"
    assert "means of the last 65" in shown.page.locator("#curves .lead").inner_text()


def test_line_that_stands_for_several_steps_counts_for_all_of_them_in_the_time(visit, tmp_path):
    run = write_run(tmp_path / "run")
    lines = [metrics_line(10, 0.5) | {"step_time_s": 2.0}, metrics_line(20, 0.5) | {"step_time_s": 1.0}]
    write_lines(run / "metrics.jsonl", lines)
    assert "30 s" in visit(write_report(run)).texts(".figure")


def test_one_logged_step_is_drawn(visit, tmp_path):
    shown = visit(write_report(write_run(tmp_path / "run", num_steps=1)))
    assert shown.page.locator(".chart svg").count() == 9
    assert shown.complaints == []


# --- what is embedded -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """200 steps of 10 groups of 4 rollouts, 450 pictures of 112 px, each shown in several groups."""
    run = write_run(tmp_path_factory.mktemp("runs") / "long", num_steps=200)
    images = write_thumbnails(run, 450, side_px=112)
    rng = random.Random(0)
    lines = [
        group_line(step, number, rng.choices(list(OUTCOMES), k=4), rng.sample(images, 3))
        for step in range(1, 201)
        for number in range(10)
    ]
    write_lines(run / "rollouts.jsonl", lines)
    return run


def embedded(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="rollouts-data">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(text)


def test_long_run_stays_under_5_mb_with_each_picture_once(visit, long_run, tmp_path):
    path = write_report(long_run, tmp_path / "long.html")
    assert path.stat().st_size < 5_000_000
    found = embedded(path.read_text(encoding="utf-8"))
    assert len(found["groups"]) == MAX_GROUPS == 1600
    assert len(found["images"]) == len(set(found["images"])) == MAX_THUMBNAILS == 400
    per_step = Counter(group["step"] for group in found["groups"])
    assert len(per_step) == 200 and set(per_step.values()) <= {7, 8, 9}
    shown = visit(path)
    text = shown.page.locator("#rollouts .lead").inner_text()
    assert "1,600 of 2,000 recorded groups" in text and "400 of 450 pictures" in text
    assert shown.texts("#count") == ["1,600 of 1,600 groups shown"]
    assert shown.page.locator(".group").count() == 10
    assert shown.complaints == []


def test_long_completions_make_fewer_groups_not_a_larger_page(long_run, tmp_path):
    run = write_run(tmp_path / "run", num_steps=1)
    lines = [group_line(step, 0, ["prose"] * 4, []) for step in range(1, 1001)]
    for line in lines:
        for rollout in line["rollouts"]:
            rollout["completion"] = "<think> " * 400
    write_lines(run / "rollouts.jsonl", lines)
    path = write_report(run)
    assert path.stat().st_size < 5_000_000
    steps = [group["step"] for group in embedded(path.read_text(encoding="utf-8"))["groups"]]
    assert 50 < len(steps) < 400 and (steps[0], steps[-1]) == (1, 1000)


def test_same_records_give_the_same_bytes_and_unique_ids(full_run, full_report, tmp_path):
    page = full_report.read_text(encoding="utf-8")
    assert write_report(full_run, tmp_path / "again.html").read_text(encoding="utf-8") == page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


def test_imports_neither_torch_nor_the_libraries_on_it():
    code = "import report, sys; print({'torch', 'transformers', 'trl', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(report.__file__).parent
    )
    assert done.stdout.strip() == "{'numpy'}", done.stderr


# --- what is refused --------------------------------------------------------------------------------------------------

BROKEN_RUNS = {
    "no folder": (lambda run: shutil.rmtree(run), "is no folder; pass the --output_dir"),
    "no config": (lambda run: (run / "config.json").unlink(), "has no config.json, but a run has both"),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), "has no metrics.jsonl, but a run has both"),
    "a model's config": (lambda run: (run / "config.json").write_text('{"hidden_size": 8}'), 'has no "options"'),
    "torn config": (lambda run: (run / "config.json").write_text('{"opt'), "config.json is not JSON"),
    "broken metrics": (
        lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n'),
        r"metrics.jsonl, line 2 is not JSON .*; remove that line",
    ),
    "metrics without a step": (lambda run: (run / "metrics.jsonl").write_text("{}\n"), "line 1 has step=None"),
    "broken rollouts": (
        lambda run: (run / "rollouts.jsonl").write_text('nonsense\n{"step": 1}\n'),
        "rollouts.jsonl, line 1 is not JSON",
    ),
    "rollouts of another form": (
        lambda run: (run / "rollouts.jsonl").write_text('{"step": 1}\n'),
        r"rollouts.jsonl, line 1 is no record of a group \(KeyError\('group'\)\)",
    ),
    "evaluations of another schema": (
        lambda run: write_lines(run / "evaluations.jsonl", [evaluation(0, 0.5) | {"schema_version": 3}]),
        "schema_version=3, but this report reads 2",
    ),
}


@pytest.mark.parametrize(("break_run", "wanted"), BROKEN_RUNS.values(), ids=BROKEN_RUNS.keys())
def test_broken_run_is_refused_in_one_line_and_an_older_report_kept(tmp_path, capsys, break_run, wanted):
    run, output = write_run(tmp_path / "run", num_steps=2), tmp_path / "older.html"
    output.write_text("an older report")
    break_run(run)
    with pytest.raises(UsageError, match=wanted):
        write_report(run, output)
    assert report.main([str(run), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert output.read_text() == "an older report"
    assert sorted(path.name for path in tmp_path.iterdir() if path != run) == ["older.html"]


def test_output_that_cannot_be_written_is_refused(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(UsageError, match="is a folder; pass --output with a file"):
        write_report(run, tmp_path)
    with pytest.raises(UsageError, match="cannot be written .*; pass --output with another file"):
        write_report(run, tmp_path / "missing" / "report.html")


def test_the_evaluation_beside_the_run_is_a_column_of_its_own(visit, tmp_path):
    run = write_run(tmp_path / "run", num_steps=3)
    (run / "evaluation.json").write_text(json.dumps(evaluation(None, 0.9)))
    assert "separate" in visit(write_report(run)).page.inner_text("body")
    (run / "evaluation.json").write_text("{")
    with pytest.raises(UsageError, match="evaluation.json is not JSON .*; write it again with evaluate.py --overwrite"):
        write_report(run)


def test_command_line_writes_into_the_run(tmp_path, capsys):
    run = write_run(tmp_path / "run", num_steps=2)
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out == f"wrote {run / 'report.html'} (0.1 MB)\n"
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "metrics.jsonl", "report.html"]


TORN = {
    "cut in an object": '{"step": 1}\n{"step"',
    "cut in a character": b'{"step": 1}\n{"a": "' + b"\xc3",
    "whole": '{"step": 1}\n',
}


@pytest.mark.parametrize("content", TORN.values(), ids=TORN.keys())
def test_torn_last_line_is_left_out(tmp_path, content):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_jsonl(path) == [{"step": 1}]


def test_line_that_is_no_object_is_refused(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "a\u2028b"}\n7\n{}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="lines.jsonl, line 2 is b'7', but wanted a JSON object"):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        ({"p_value": 0.0002, "only_model_right": 12, "only_baseline_right": 3}, "+5.9 to +11.8; p < 0.001; 12 vs 3"),
        ({"p_value": 0.0421, "only_model_right": 12, "only_baseline_right": 3}, "+5.9 to +11.8; p=0.042; 12 vs 3"),
        ({}, "+5.9 to +11.8"),
    ],
)
def test_the_lead_over_the_baseline_is_shown_as_it_stands(extra: dict, wanted: str) -> None:
    difference = {**estimate(0.09), **extra}
    document = evaluation(30, 0.8) | {"baseline": {"model": "toy", "difference": difference}}
    cells = {row.name: row.cells[0] for row in evaluation_rows([document])}
    assert cells["Lead over the baseline"] == Cell("+9.0", wanted)
    # the page spells out whatever does not print
    assert all(text.isprintable() for cell in cells.values() for text in (cell.text, cell.detail))
