"""The report says what the findings say, and works in a browser that has no network."""

import dataclasses
import html.parser
import itertools
import json
import pathlib
import re
import shutil

import pytest
from made_up import (
    BAD_CASES,
    break_everything,
    comparison,
    contrast,
    make_findings,
    make_mediation,
    make_part,
)

from soap_jax.study import claims, mediation, preset_claims, report

NAMES = ["loss_curves", "steps_to_loss", "angles", "effective_learning_rate", "claims"]
NAMES += ["final_metric"]


@pytest.fixture(scope="module")
def study():
    return comparison(seeds=3, rates=(0.02, 0.05, 0.1, 0.2, 2.0))


@pytest.fixture(scope="module")
def page(study):
    told = [dataclasses.replace(f, p_words="p of the verdict") for f in make_findings()]
    return report.render(study, told)


class Text(html.parser.HTMLParser):
    """What a page says, and its elements."""

    def __init__(self, page):
        super().__init__()
        self.words, self.tags, self.hidden = [], [], 0
        self.feed(page)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.hidden:
            self.words.append(data)


def test_verdicts_come_first_and_in_words(page):
    text = Text(page).text
    for finding in make_findings():
        assert finding.statement in text and finding.why in text
    assert text.count(" (p of the verdict)") == 7
    assert (
        text.index("of 7 claims, 4 hold") < text.index("Verdicts") < text.index("Loss at learning")
    )
    assert "✗ fails" in text and "? undecided" in text
    assert "0.950 [0.930, 0.970] , the interval lies above 0.9" in text


def test_the_summary_counts_verdicts_and_claims_no_more(study):
    findings = make_findings()
    assert report.summarise(study, findings) == (
        "On digits, over 3 seeds: of 7 claims, 4 hold (claims 1, 2, 3, 7), 1 fails (claim 6), "
        "1 is undecided (claim 4) and 1 is not testable here (claim 7b)."
    )
    assert report.summarise(study, findings[4:5]) == (
        "On digits, over 3 seeds: of 1 claim, 1 fails (claim 6)."
    )
    assert report.summarise(study, []) == "On digits, over 3 seeds: no claim was tested."


def test_exploratory_findings_are_called_so(study, page):
    assert "(exploratory)" not in page
    findings = [dataclasses.replace(make_findings()[0], exploratory=True)]
    assert "holds (exploratory)" in Text(report.render(study, findings)).text


def test_a_glossary_says_what_each_method_isolates_and_where_it_is_from(study):
    study.methods["fa"]["paper"] = "Lillicrap et al. 2016"
    text = Text(report.render(study, [])).text
    assert text.index("no claim was tested") < text.index("the reference")
    assert "FA, fixed feedback fixed random feedback (Lillicrap et al. 2016)" in text
    assert text.index("hidden layers untrained: to be beaten") < text.index("No claim was tested.")


def test_the_page_asks_for_nothing_and_vega_is_there_once(page):
    assert page.count("window.vegaEmbed") == 1 and page.count("default-src 'none'") == 1
    assert "unsafe-eval" not in page
    loading = {"script": "src", "img": "src", "iframe": "src", "link": "href"}
    for tag, attributes in Text(page).tags:
        if tag in loading:
            assert attributes.get(loading[tag], "data:").startswith("data:")
    assert "@import" not in page.split("</style>")[0]


def test_vega_dominates_the_size_of_the_page(page):
    assert len(page) - len(report.vega()) < 500_000
    assert len(page) < 1_500_000


def test_headings_are_in_order_and_landmarks_are_there(page):
    tags = [tag for tag, _ in Text(page).tags]
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert {"main", "header", "nav", "footer"} <= set(tags)
    assert ("html", {"lang": "en"}) in Text(page).tags


def test_every_figure_has_a_text_and_a_table(page):
    plots = [attrs for tag, attrs in Text(page).tags if attrs.get("class") == "plot"]
    assert len(plots) == len(NAMES)
    assert all(len(plot["aria-label"]) > 50 and plot["role"] == "img" for plot in plots)
    regions = [attrs["aria-label"] for _, attrs in Text(page).tags if attrs.get("role") == "region"]
    assert sum(label.startswith("Data of: ") for label in regions) == len(NAMES)


def test_ids_are_unique_and_links_lead_to_them(page):
    tags = Text(page).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert {attrs["href"][1:] for tag, attrs in tags if tag == "a"} <= set(ids)


def colors(scheme):
    """The style sheet's variables in a colour scheme."""
    sheet = (pathlib.Path(report.__file__).parent / "templates" / "report.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", sheet, re.DOTALL)[:2]
    found = dict(re.findall(r"--(\w+): (#\w{6})", light))
    return found | (dict(re.findall(r"--(\w+): (#\w{6})", dark)) if scheme == "dark" else {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme):
    found = colors(scheme)
    for background in ("paper", "card"):
        for text in ("ink", "muted", "link", "holds", "fails", "undecided"):
            assert contrast(found[text], found[background]) >= 4.5, (text, background)
    assert contrast(colors("light")["ink"], colors("dark")["ink"]) > 10


def test_the_command_that_repeats_it_is_there_if_there_is_one(study, page):
    assert "<code>soap-jax study</code>" in page and "soap-jax report DIR" in page
    study.record["command"] = None
    assert "soap-jax study" not in Text(report.render(study, [])).text
    study.record["command"] = "soap-jax study"


def test_configuration_and_environment_are_there(study):
    study.record["config"] = {"hidden": [256, 64], "memory_limit": None}
    text = Text(report.render(study, [])).text
    assert "hidden 256, 64" in text and "memory limit default" in text
    assert "versions soap_jax: 0.2.0, jax: 0.10.2" in text
    study.record["config"] = None


def test_hostile_words_stay_words():
    bad = "<script>alert(1)</script></script><b>\"'&{{ 7 * 7 }}"
    made = comparison(("bp", "fa"), seeds=2, rates=(0.1,), title=bad, data_source=bad, command=bad)
    made.methods["fa"].update(label=bad, isolates=bad, paper=bad, description=bad)
    part = make_part(bad, 1.0, 0.9, 1.1, (0.5, 2), note=bad)
    finding = claims.Finding(
        key=bad, statement=bad, verdict=claims.HOLDS, why=bad, p=0.01, family=1, parts=(part,)
    )
    page = report.render(made, [finding])
    assert "<script>alert" not in page
    assert Text(page).text.count("<script>alert(1)</script>") >= 8
    specs = re.search(r'<script type="application/json" id="specs">(.*?)</script>', page, re.DOTALL)
    assert bad in json.dumps(json.loads(specs[1])).replace('\\"', '"')


@pytest.mark.parametrize("changes", BAD_CASES.values(), ids=BAD_CASES)
def test_small_studies_have_a_report(changes):
    made = comparison(**{"seeds": 2, **changes})
    text = Text(report.render(made, [])).text
    assert "No claim was tested." in text and "nan" not in text.lower().split()
    assert ("Causes of the effect on speed" in text) == mediation.mediate(made).testable


def test_words_stand_where_nothing_is_left_to_see(study):
    page = report.render(break_everything(study), make_findings()[-1:])
    text = Text(page).text
    assert "No claim could be tested by a ratio" in text
    assert "Every method has diverged runs at every learning rate." in text
    assert "vegaEmbed" not in page  # there is no figure that would need it


def test_the_report_lies_beside_its_figures_and_tables(tmp_path):
    stored = [claim.to_dict() for claim in preset_claims.CLAIMS]
    made = comparison(periods=(1, 10, 100), claims=stored)
    made.report(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("report.html", "summary.csv", "claims.csv", "mediation.csv", "figures")
    }
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    for name in [*NAMES, "overview", "mediation"]:
        assert {f"{name}.svg", f"{name}.png", f"{name}.pdf"} <= figures
    assert "Causes of the effect on speed" in (tmp_path / "report.html").read_text()
    made = comparison(("bp", "fa"), seeds=2)
    made.report(tmp_path)
    assert not list((tmp_path / "figures").glob("mediation.*"))
    assert not (tmp_path / "mediation.csv").exists()


def test_the_page_alone_is_written_to_a_file(study, tmp_path):
    report.write(study, [], tmp_path / "mine.html")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.html"]
    assert "No claim was tested." in (tmp_path / "mine.html").read_text()


# In a browser


@pytest.fixture(scope="module")
def browser():
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("needs a browser: chromium is not installed")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def file(study, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mediation, "mediate", lambda made: make_mediation())
        path.write_text(report.render(study, make_findings()), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser, file):
    """Opens the report; afterwards, says that nothing was wrong and nothing was asked for."""
    contexts, problems = [], []

    def open_page(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda said: problems.append(f"{said.type}: {said.text}"))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda asked: problems.append(asked.url))
        tab.goto(file.as_uri())
        tab.wait_for_function(
            "() => [...document.querySelectorAll('.plot')].every(p => p.querySelector('svg.marks'))"
        )
        return tab

    yield open_page
    for context in contexts:
        context.close()
    harmless = (file.as_uri(), "data:", "blob:")
    assert [problem for problem in problems if not problem.startswith(harmless)] == []


def count(tab, selector):
    return tab.locator(selector).count()


MARKERS = "#plot-steps_to_loss .role-mark.mark-symbol path"
ENTRIES = "#plot-steps_to_loss .role-legend-symbol path"


def test_every_figure_is_drawn(opened):
    tab = opened()
    for name in NAMES:
        assert count(tab, f"#plot-{name} .role-mark.mark-symbol path") >= 3, name
    assert count(tab, "svg.diagram rect") == 4 and count(tab, "svg.diagram title") == 1
    assert "digits" in tab.title()


def test_a_click_on_the_legend_shows_a_method_alone_and_another_all(opened):
    tab = opened()
    there = f"() => document.querySelectorAll('{MARKERS}').length"
    all_of_them = count(tab, MARKERS)
    entry = tab.locator(ENTRIES).first
    entry.click()
    tab.wait_for_function(f"{there} < {all_of_them} / 4")
    assert count(tab, ENTRIES) == 8
    alone = count(tab, MARKERS)
    tab.locator(ENTRIES).nth(1).click()  # another beside it
    tab.wait_for_function(f"{there} > {alone}")
    entry.click()
    tab.locator(ENTRIES).nth(1).click()
    tab.wait_for_function(f"{there} == {all_of_them}")


def test_pointing_at_a_figure_shows_values_inside_a_phone(opened):
    tab = opened(viewport={"width": 360, "height": 800})
    tab.locator("#plot-steps_to_loss").scroll_into_view_if_needed()
    tab.locator(MARKERS).first.hover()
    shown = tab.locator("#vg-tooltip-element.visible")
    shown.wait_for()
    assert re.search(r"backprop.*3 of 3 runs reach loss 0\.5", shown.inner_text(), re.DOTALL)
    box = shown.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_a_button_makes_axes_linear_and_logarithmic(opened):
    tab = opened()
    assert count(tab, "#plot-angles ~ button") == 0
    button = tab.locator("figure:has(#plot-steps_to_loss) button")
    marker = tab.locator(MARKERS).first
    before = marker.get_attribute("transform")
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    unequal = "old => document.querySelector({!r}).getAttribute('transform') {} old"
    tab.wait_for_function(unequal.format(MARKERS, "!="), arg=before)
    button.click()
    tab.wait_for_function(unequal.format(MARKERS, "=="), arg=before)


def test_a_figure_can_be_kept_as_an_image_and_nothing_can_be_sent_anywhere(opened):
    tab = opened()
    actions = tab.locator("#plot-final_metric .vega-actions a")
    tab.locator("#plot-final_metric summary").click()
    assert actions.all_inner_texts() == ["Save as SVG", "Save as PNG"]
    with tab.expect_download() as download:
        actions.last.click()
    assert download.value.suggested_filename == "final_metric.png"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "narrower"), [(1100, 900), (390, 360)])
def test_nothing_overflows_and_the_figures_text_has_contrast(opened, width, narrower, scheme):
    tab = opened(viewport={"width": width, "height": 800}, color_scheme=scheme)
    for details in tab.locator("main details:not(.plot details)").all():
        details.evaluate("element => element.open = true")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert cut_off(tab) == []
    fills = tab.evaluate(
        "[...new Set([...document.querySelectorAll('.plot svg text, svg.diagram text')].map("
        "element => getComputedStyle(element).fill))]"
    )
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert contrast(hexadecimal(background), colors(scheme)["paper"]) == 1
    assert fills and all(contrast(hexadecimal(f), hexadecimal(background)) >= 4.5 for f in fills)
    tab.set_viewport_size({"width": narrower, "height": 800})  # the phone is turned
    tab.wait_for_function(f"() => document.documentElement.scrollWidth <= {narrower}")
    tab.wait_for_timeout(600)  # for figures to follow
    assert cut_off(tab) == []


def cut_off(tab):
    """Words of figures that end beyond their drawing."""
    return tab.evaluate(
        "[...document.querySelectorAll('.plot svg text, svg.diagram text')].filter(text => {"
        "const [a, b] = [text, text.ownerSVGElement].map(e => e.getBoundingClientRect());"
        "return a.left < b.left - 1 || a.right > b.right + 1}).map(text => text.textContent)"
    )


def hexadecimal(color):
    """ "rgb(1, 2, 3)" as "#010203"."""
    return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", color)[:3])


def test_without_javascript_verdicts_and_data_are_there(browser, file):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(file.as_uri())
    assert "FA needs about twice" in tab.locator("main").inner_text()
    assert count(tab, "figure table") == len(NAMES) + 1
    context.close()
