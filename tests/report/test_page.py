"""The page of a full and of an empty run: complete, self-contained, escaped, and honest about what is missing."""

import copy
import io
import json
import math
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from rich.console import Console

from openling.errors import UserError
from openling.report import build, completions, plots, side_by_side, summary_table
from openling.report.page import crossing
from openling.report.schema import DecodeRow, parse, read_metrics

KINDS = ["lightning", "lightning", "lightning", "mla"] * 2
NAMES = ["teacher", "lightning", "linear-warmup", "mla", "mla-warmup"]
LOSS = {"python-docs": [2.31, 8.9, 3.4, 4.6, 3.55], "kjv": [3.02, 11.2, 5.2, 6.1, 5.31]}
NASTY = "<script>alert('x')</script> & <img src=\"https://example.org/x.png\" onerror=1> " + "W" * 400


def agreement(domain, i):
    loss, teacher = LOSS[domain][i], LOSS[domain][0]
    row = {"loss": loss, "loss_stderr": 0.03, "perplexity": math.exp(loss), "teacher_loss": teacher, "gap_stderr": 0.02}
    return row | {"gap": loss - teacher, "kl": loss - teacher, "top1": math.exp(teacher - loss), "tokens": 4064}


def verdict(gate, outcome, unit, value, limit=None, standard=None, text=None, why=""):
    rows = {"gate": gate, "outcome": outcome, "unit": unit, "value": value, "limit": limit}
    return rows | {"standard": standard, "text": text, "why": why}


def stage(i):
    name = NAMES[i]
    kinds = ["gqa" if kind == "mla" and i < 3 else kind for kind in KINDS]
    out = {"name": name, "domains": {domain: agreement(domain, i) for domain in LOSS}}
    right = [1, 0, 0.25, 0, 0.125][i]
    deep = [{"depth": 0.1, "exact": right, "token_accuracy": 0.5, "n": 8}, {"depth": 0.9, "exact": 0.5, "n": 2}]
    out["needle"] = [{"length": n, "exact": right, "token_accuracy": 0.5, "n": 8, "depths": deep} for n in (128, 256)]
    out["needle_left_out"] = [512]
    if name == "mla-warmup":
        one = {"length": 256, "exact": 0.375, "token_accuracy": 0.5, "n": 8, "depths": [{"depth": 0.5, "exact": 0.375, "n": 8}]}
        out |= {"needle_keys": 4, "needle_among": [one]}
    out["samples"] = [{"prompt": "The capital of France is", "completion": NASTY if i == 4 else f" answer {i}"}]
    if i:
        rows = [(j, kind, 0.0 if kind == "gqa" else 0.1 * (j + 1), 0.2 * (j + 1)) for j, kind in enumerate(kinds)]
        out["layers"] = [dict(zip(("layer", "kind", "local", "propagated"), row, strict=True)) for row in rows]
        out |= {"seconds": 12.5 * i, "tokens": 1000 * i, "notes": [f"note {i} <b>"]}
        out["bytes"] = {"read": 2048 if i == 1 else 0, "written": 4 << 20, "changed": 3 << 10}
        out["spent"] = {"work": 10.0 * i, "measure": 2.0 * i, "write": 0.5 * i}
        drift = [(1, 0.1 * i, 0.9, 0.05), (4, 0.2 * i, 0.7, 0.15)]
        out["routers"] = [dict(zip(("layer", "changed", "kept", "kl"), row, strict=True)) for row in drift]
    if name == "mla":
        out["approximations"] = [{"step": "joint PCA", "layer": j, "measure": "share lost", "value": j / 100} for j in (3, 7)]
    out["gates"] = [verdict("finite", "passed", "values", 0.0, 0.0, 0.0)]
    if name == "lightning":
        out["heads"] = [{"layer": j, "half_life": [2.0, 700.0], "look_back": [30.0, 31.5]} for j in range(3)]
        unit = "x the loss of guessing"
        out["gates"].append(verdict("lightning_loss", "let through", unit, 1.036, None, 1.0, "kjv", "11.200 nats"))
    if name == "mla":
        curves = [(3, "kv", 0.9), (7, "kv", 0.95), (3, "query", 0.8)]
        out["spectra"] = [
            {"layer": j, "part": part, "rank": 8, "ranks": [1, 8, 32], "energy": [0.2, kept, 1.0]} for j, part, kept in curves
        ]
        kept = [("kv energy kept", 3, 0.9), ("kv energy kept", 7, 0.95), ("rope energy kept", 3, 0.6)]
        out["approximations"] += [{"step": "MLA factors", "layer": j, "measure": m, "value": v} for m, j, v in kept]
        out["gates"].append(verdict("mla_step", "stopped", "nats", 1.2, 0.515, 0.515, "<i>text</i>", "from 3.400 to 4.600"))
    if name.endswith("warmup"):
        out["gates"].append(verdict("warmup_rise", "not judged", "nats", None, 0.02, 0.02, why="no loss was measured"))
        why = "teacher 20 of 20, student 9 of 20"
        if name == "linear-warmup":
            out["gates"].append(
                verdict("recall_drop", "warned", "of the needles lost", 0.55, text="needles in 64 tokens", why=why)
            )
        out["gates"].append(verdict("final_gap", "off", "nats", 0.5))
        out["metrics"] = f"{name}/metrics.jsonl"
    return out


def decode(context, base, slope, ms):
    size = base + slope * context
    return {"context": context, "cache_bytes": size, "formula_bytes": size, "ms_per_token": ms, "peak_bytes": 10**9}


def full_report():
    figures = {"total_params": 134_515_008, "active_params": 134_515_008, "kv_bytes_per_token": 23040}
    source = figures | {"state_bytes_per_sequence": 0, "break_even_tokens": None}
    plan = figures | {"kv_bytes_per_token": 2560, "state_bytes_per_sequence": 3_686_400, "break_even_tokens": 180}
    return {
        "title": "A <b>title</b>",
        "command": "openling demo --out 'a & b'",
        "date": "2026-11-22",
        "commit": "abc1234",
        "seconds": 412.3,
        "environment": {"torch": "2.13.0", "hardware": "2 cores"},
        "settings": {"what the page": "does not show", "text": {"sequence_length": 512}},
        "plan": plan | {"source": source},
        "layout": {"group_size": 4, "layer_kinds": KINDS, "said": "groups of 4"},
        "texts": [{"name": "kjv", "licence": "public domain", "role": "evaluation", "source": "King James Bible"}],
        "stages": [stage(i) for i in range(5)],
        "decode": {
            "teacher": [decode(c, 0, 46080, 30 + c / 1000) for c in (1024, 8192)],
            "hybrid": [decode(c, 3_686_400, 5120, 40) for c in (1024, 8192)],
        },
        "presets": [{"preset": "paper", "stage": "lightning", "domain": "kjv", "loss": 13.9, "gap": 10.88}],
        "shipped": {
            "tokens": 40_000_000,
            "hardware": "A CPU, with a comma, 16 cores, 128 GiB, NVIDIA H100 80GB HBM3",
            "about": {"preset": "best", "data": "<i>a text</i> (CC0-1.0): calibration", "not": "shown"},
            "stage": stage(2) | {"name": "shipped hybrid"},
            "decode": [decode(c, 3_686_400, 5120, 40) for c in (1024, 8192)],
        },
    }


def write_run(folder, report):
    (folder / "report.json").write_text(json.dumps(report))
    for one in report["stages"]:
        if one.get("metrics"):
            log = folder / one["metrics"]
            log.parent.mkdir()
            rows = [{"step": k + 1, "tokens": 256 * (k + 1), "loss": 9 - k, "ce": 5 - k / 2, "kl": 4 - k / 2} for k in range(5)]
            log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Page(HTMLParser):
    """Tags with their attributes, ids, and the text under each h2."""

    VOID = {"meta", "br", "img", "link", "input", "hr", "path", "use"}

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.sections, self.order, self.text = [], [], {"": ""}, [], ""
        self.section = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "h2":
            self.section = dict(attributes)["id"]
            self.order.append(self.section)
            self.sections[self.section] = ""

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.handle_data(" ")

    def handle_data(self, data):
        self.text += data
        self.sections[self.section] += data


SECTIONS = ["shipped", "plan", "stages", "gates", "took", "curves", "layers", "energy", "heads", "routers", "needle"]
SECTIONS += ["decode", "samples", "presets", "approximations", "environment"]
# Warm-up curves, stages with layers, energy by rank (two factors) and by layer, half-lives, routers, recall, decoding.
PLOTS = 2 + 4 + 3 + 2 + 1 + 1 + 2


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    return build(write_run(tmp_path_factory.mktemp("run"), full_report())).read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_every_tag_is_closed_and_sections_are_in_order(page):
    assert page.open == []
    assert page.order == SECTIONS


def test_nothing_is_fetched_and_nothing_runs(html, page):
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base", "form"} == set()
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                assert value.startswith("#"), (tag, name, value)
    # The only address is text that a model wrote, escaped; no namespace, style sheet or font is named by one.
    assert set(re.findall(r"https?://\S+", html)) == {"https://example.org/x.png&#34;"}
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", html) == []


def test_what_models_and_users_wrote_is_escaped(html, page):
    assert NASTY in page.sections["samples"]
    assert "A <b>title</b>" in page.text
    assert "openling demo --out 'a & b'" in page.text
    assert "note 1 <b>" in page.text
    assert "<script" not in html
    assert "<b>" not in html


def test_ids_are_unique_and_every_reference_is_met(html, page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", html)) | set(re.findall(r'href="#([^"]+)"', html))
    assert used
    assert used <= set(ids)


def test_every_plot_is_there_and_takes_its_colours_from_the_page(html, page):
    svgs = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(svgs) == PLOTS
    assert all("viewbox" in svg and "width" not in svg for svg in svgs)
    # A title that is shown and read, and what the axes tell.
    titles = re.findall(r"<figcaption>(.+?)</figcaption>", html)
    labels = [svg["aria-label"] for svg in svgs]
    assert all(label.startswith(f"{unescape(title)}: ") for label, title in zip(labels, titles, strict=True))
    drawn = html[html.index("<svg") :]
    variables = set(re.findall(r"var\(--(\w+)\)", drawn))
    assert {"ink", "grid", "blue", "orange", "muted", "green"} <= variables
    assert not re.search(r"#0[1-8]0[1-8]0[1-8]", drawn)
    assert variables <= set(re.findall(r"--(\w+):", html))


def test_the_headline_has_the_key_numbers(page):
    lead = page.sections[""]
    assert "The 8 softmax-attention layers of the teacher became 6 Lightning and 2 MLA layers" in lead
    assert "2.5 KiB of cache per token instead of 22.5 KiB, 9.0 times less" in lead
    assert "after 6K tokens of warm-up" in lead
    assert "3.550 on python-docs (+1.240 over the teacher); 5.310 on kjv (+2.290 over the teacher)" in lead
    # exp(2.29) = 9.87; (8.9 - 3.55) / (8.9 - 2.31) = 81 %.
    assert "9.87 times less probability" in lead
    assert "81 % of that recovered" in lead
    assert "Stopped at a gate. MLA conversion: loss that the MLA conversion adds, +1.200 nats (from 3.400 to 4.600)" in lead
    warned = "linear warm-up: recall below the teacher's, 0.55 of the needles lost (teacher 20 of 20, student 9 of 20)"
    assert f"Worth a look, and no gate is set for it. {warned}. --gates.recall_drop with a limit stops there." in lead
    assert "the limit is 0.515 nats. To go on all the same: --resume and --gates.mla_step with a wider limit" in lead
    assert "let through. Lightning conversion: loss after the Lightning conversion, 1.036 x the loss of guessing" in lead
    assert "Needles found at 256 tokens: 8 of 8 (teacher), 1 of 8 (MLA warm-up)" in lead


def test_the_sections_hold_their_numbers(page):
    said = {name: " ".join(text.split()) for name, text in page.sections.items()}
    assert "180 tokens" in said["plan"]
    assert "11.200 ± 0.030 +8.180 ± 0.020 73,130 8.180" in said["stages"]
    assert "(lightning_loss) kjv 1.036 x the loss of guessing (11.200 nats) none" in said["gates"]
    assert "(usually 1 x the loss of guessing) let through" in said["gates"]
    assert "(mla_step) <i>text</i> +1.200 nats (from 3.400 to 4.600) 0.515 nats stopped" in said["gates"]
    assert "not judged: no loss was measured" in said["gates"]
    assert (
        "(recall_drop) needles in 64 tokens 0.55 of the needles lost (teacher 20 of 20, student 9 of 20) none warned"
        in said["gates"]
    )
    assert "final_gap" not in said["gates"]
    assert "5 steps, 1.28K tokens, loss 9.00 → 5.00" in said["curves"]
    assert "MLA warm-up 4K 0 B 3 KiB 4 MiB 40.0 s 8.0 s 2.0 s 50.0 s" in said["took"]
    assert "In 3 of 6 heads the state has faded to one half" in said["heads"]
    assert "the longest half-life is 700 tokens" in said["heads"]
    assert "in windows of 512 tokens" in said["heads"]
    # Means of two layers: (0.2 + 0.4) / 2 and so on.
    assert "linear warm-up 30.0 % 40.0 % layer 4 80.0 % 0.100" in said["routers"]
    assert "chosen rank 8" in said["energy"]
    assert "layer 7: 95 %" in said["energy"]
    assert "depth 128 tokens 256 tokens 512 tokens 10 % 2 of 8 2 of 8 not run 90 % 1 of 2 1 of 2 not run" in said["needle"]
    assert "all depths 2 of 8 2 of 8 not run" in said["needle"]
    before, among = said["needle"].split(", one fact of 4")
    assert before.endswith("MLA warm-up")
    assert among.startswith(
        "depth 128 tokens 256 tokens 512 tokens 50 % not run 3 of 8 not run all depths not run 3 of 8 not run"
    )
    assert "No NaN and no infinity, in weights or measurements, after: teacher, Lightning conversion" in said["gates"]
    # 3686400 / (46080 - 5120) = 90.
    assert "break-even 90 tokens" in said["decode"]
    assert "joint PCA share lost 2 0.05 0.03 layer 3 0.07 layer 7" in said["approximations"]
    assert "King James Bible" in said["environment"]
    assert not any("not run" in text for name, text in said.items() if name != "needle")


def test_the_shipped_hybrid_stands_beside_the_run(page):
    said = " ".join(page.sections["shipped"].split())
    assert "teacher this run 6K tokens on 2 cores shipped 40M tokens on one NVIDIA H100 80GB HBM3" in said
    assert "loss on python-docs 2.310 3.550 3.400 over the teacher – +1.240 +1.090" in said
    assert "needles found, 256 tokens 8 of 8 1 of 8 2 of 8" in said
    # 8192 x 46080 bytes, and 3686400 + 8192 x 5120.
    assert "cache at 8,192 tokens 360 MiB 43.52 MiB 43.52 MiB time per token there 38.2 ms 40 ms 40 ms" in said
    assert "depth 128 tokens 256 tokens 10 % 2 of 8 2 of 8 90 % 1 of 2" in said
    assert "answer 0" in said
    assert "answer 2" in said
    assert "data <i>a text</i> (CC0-1.0): calibration" in said
    assert "shown" not in said
    assert "on one NVIDIA H100 80GB HBM3, has 3.400 on python-docs (+1.090 over the teacher); 5.200 on kjv" in page.sections[""]


def test_the_shipped_hybrid_in_a_terminal():
    report = full_report()
    console = Console(width=100, file=io.StringIO())
    console.print(side_by_side(report))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "loss on kjv 3.020 5.310 5.200 over the teacher – +2.290 +2.180" in " ".join(text.split())
    written = completions(report)
    assert "“The capital of France is” goes on, greedily:\n  teacher:  answer 0\n" in written
    assert "  shipped:  answer 2\n" in written
    assert NASTY in written


def test_without_a_run_the_shipped_hybrid_stands_beside_its_teacher(tmp_path):
    """And a card that says neither tokens nor hardware."""
    report = full_report()
    report["stages"], report["shipped"]["tokens"], report["shipped"]["hardware"] = report["stages"][:1], None, None
    page = Page(build(write_run(tmp_path, report)).read_text())
    assert "loss on python-docs 2.310 3.400" in " ".join(page.sections["shipped"].split())
    assert "The shipped hybrid beside its teacher" in page.sections["shipped"]
    assert "The hybrid that ships with openling has 3.400 on python-docs" in page.sections[""]


def test_what_is_missing_says_so(tmp_path):
    page = Page(build(write_run(tmp_path, {"title": "Empty", "stages": []})).read_text())
    assert page.order == SECTIONS[1:]
    assert all("not run" in page.sections[name] for name in ["", *SECTIONS[1:]])
    assert not (tmp_path / "report.html.tmp").exists()


@pytest.mark.parametrize("field", ["plan", "layout", "texts", "decode", "presets", "environment", "command", "date", "seconds"])
def test_any_field_may_be_missing(tmp_path, field):
    report = full_report()
    del report[field]
    for one in report["stages"]:
        one["metrics"], one["layers"] = None, []
        one["bytes"] = one["spent"] = None
    page = Page(build(write_run(tmp_path, report)).read_text())
    assert page.order == SECTIONS
    assert "not run" in page.sections["layers"]


def test_what_a_run_writes_before_it_is_finished(tmp_path):
    """The teacher without time and tokens, a layout without kinds, a measured stage without needles."""
    report = full_report()
    report["layout"], report["stages"] = {"group_size": 4, "said": "groups of 4"}, report["stages"][:2]
    report["stages"][1]["needle"] = []
    page = Page(build(write_run(tmp_path, report)).read_text())
    assert "became 6 Lightning and 2 GQA layers" in page.sections[""]
    assert "not run" in page.sections["stages"]
    assert "not run" in page.sections["curves"]


def test_an_absent_or_torn_log_is_no_crash(tmp_path):
    write_run(tmp_path, full_report())
    (tmp_path / "linear-warmup" / "metrics.jsonl").unlink()
    log = tmp_path / "mla-warmup" / "metrics.jsonl"
    whole = read_metrics(tmp_path, "mla-warmup/metrics.jsonl")
    log.write_text(log.read_text() + '{"step": 6, "tok')
    assert read_metrics(tmp_path, "mla-warmup/metrics.jsonl") == whole
    said = Page(build(tmp_path).read_text()).sections["curves"]
    assert "not run: linear-warmup/metrics.jsonl is missing" in said
    assert "MLA warm-up: 5 steps" in said


def test_without_matplotlib_the_numbers_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    page = Page(build(write_run(tmp_path, full_report())).read_text())
    assert page.text.count("not drawn: matplotlib is not installed") == PLOTS
    assert "2 of 8" in page.sections["needle"]


def test_a_wrong_report_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="holds no report"):
        build(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        build(tmp_path)
    report = full_report()
    report["stages"][1]["domains"]["kjv"]["loss"] = "high"
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"stages\.1\.domains\.kjv\.loss"):
        build(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_one_row_of_everything_can_be_drawn(tmp_path):
    """Single points, zeros and a single length: no empty axes, no logarithm of zero."""
    report = full_report()
    report["decode"] = {"teacher": [], "hybrid": report["decode"]["hybrid"][:1]}
    for one in report["stages"]:
        one["needle"] = [{"length": 128, "exact": 0.0, "n": 1}]
        for row in one.get("layers", []):
            row["local"] = row["propagated"] = 0.0
        one["routers"] = one.get("routers", [])[:1]
        for spans in one.get("heads", []):
            spans |= {"half_life": [0.5], "look_back": [0.0]}
    html = build(write_run(tmp_path, report)).read_text()
    assert html.count("<svg") == PLOTS
    assert "nan" not in re.findall(r"<svg.*</svg>", html, flags=re.DOTALL)[0].lower()


@pytest.mark.parametrize(
    ("teacher", "hybrid", "expected"),
    [((0, 100), (1000, 50), 20.0), ((0, 100), (0, 50), 0.0), ((0, 50), (1000, 50), None), ((500, 100), (0, 50), 0.0)],
)
def test_crossing_is_where_the_lines_meet(teacher, hybrid, expected):
    rows = [[DecodeRow(**decode(c, *line, 1.0)) for c in (64, 256)] for line in (teacher, hybrid)]
    assert crossing(*rows) == expected
    assert crossing(rows[0], rows[1][:1]) is None


def rendered(report, width=100):
    console = Console(width=width, file=io.StringIO())
    console.print(summary_table(report))
    return console.file.getvalue()


def test_the_terminal_table_fits_and_cuts_nothing():
    report = full_report()
    long = "a-very-long-name-of-a-text.jsonl"
    for one in report["stages"]:
        one["domains"][long] = copy.deepcopy(one["domains"]["kjv"])
    text = rendered(report)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "A <b>title</b> (6 min 52 s)" in text
    flat = " ".join(text.split())
    assert "Lightning conversion 1K python-docs 8.900 +6.590 7,332 6.590 0.1 % 0 of 16" in flat
    assert "kjv 11.200 +8.180 73,130 8.180 0.0 %" in flat
    assert "teacher – python-docs 2.310 – 10.07 – – 16 of 16" in flat


def test_the_terminal_table_says_not_run():
    assert "not run" in rendered({"title": "x", "stages": [{"name": "lightning"}]})
    with pytest.raises(UserError, match="stages"):
        summary_table({"title": "x"})


def test_extra_fields_are_left_alone():
    assert parse(full_report(), where="report.json").title == "A <b>title</b>"
