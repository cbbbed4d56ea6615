"""docs/security.md, as far as the sources themselves can break it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from analysis import load, paper
from commonsense_reasoning.config import ModelConfig
from moslora_core.errors import UserError
from moslora_core.paths import inside
from moslora_core.record import override_label

ROOT = Path(__file__).parents[1]
PACKAGES = ("moslora_core", "commonsense_reasoning", "visual_instruction", "subject_driven_t2i", "analysis")
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# Calls that run or unpack what a file holds, by their last two names.
FORBIDDEN = {"os.system", "os.popen", "shutil.unpack_archive", "pd.read_pickle", "pandas.read_pickle", "np.memmap"}
BUILTINS = {"eval", "exec", "compile", "__import__"}


def violations(source: str) -> Iterator[str]:
    """Lines that break a rule, as ``<line>: <what>``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in PICKLES)
        if isinstance(node, ast.Call):
            yield from (f"{node.lineno}: {what}" for what in _call_violations(node))


def _call_violations(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in BUILTINS or name in FORBIDDEN or name.endswith((".extractall", ".unpickle")):
        yield f"calls {name}"
    if name == "torch.load" and not _is(given.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    loads_yaml = name.startswith("yaml.") and name.endswith(("load", "load_all")) and "safe" not in name
    # Which loader it is, is asked of the loader itself, below.
    if loads_yaml and (name != "yaml.load" or "Loader" not in given):
        yield f"{name} without a safe loader"
    for key in ("shell", "trust_remote_code", "allow_pickle"):
        if _is(given.get(key), True):
            yield f"{key}=True"
    if name.split(".")[-1] == "Markup" and not isinstance(call.args[0], ast.Constant):
        yield "Markup of what is no constant"


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("package", PACKAGES)
def test_sources_keep_the_rules(package):
    found = [
        f"{path.relative_to(ROOT)}:{entry}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for entry in violations(path.read_text(encoding="utf-8"))
    ]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "yaml.full_load(text)",
        "subprocess.run(line, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "tarfile.open(path).extractall(folder)",
        "Markup(name)",
    ],
)
def test_a_line_that_breaks_a_rule_is_found(line):
    assert list(violations(line))


@pytest.mark.parametrize("line", ["model.eval()", "yaml.safe_load(text)", "torch.load(p, weights_only=True)"])
def test_lines_that_break_none_are_not(line):
    assert not list(violations(line))


def test_yaml_of_records_builds_plain_values():
    for loader in (load._YAML, paper._Loader):
        assert issubclass(loader, yaml.SafeLoader | getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        with pytest.raises(yaml.YAMLError):
            yaml.load("!!python/object/apply:os.getcwd []", Loader=loader)


def test_no_scale_trusts_code_of_a_repository():
    assert ModelConfig.trust_remote_code is False
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.yaml"):
            assert "trust_remote_code: true" not in path.read_text(encoding="utf-8").lower(), path


def test_templates_escape_what_they_are_given():
    for path in [*ROOT.glob("analysis/*.jinja"), *ROOT.glob("subject_driven_t2i/human_study/templates/*")]:
        text = path.read_text(encoding="utf-8")
        assert "autoescape false" not in text, path


# --------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("name", ["../other/x.png", "/etc/passwd", "a/../../x.png", "link/x.png", ".."])
def test_names_in_files_do_not_lead_out(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"manifest\.json: file must lie in .*folder, found "):
        inside(folder, name, "manifest.json")
    assert inside(folder, "a/b.png", "manifest.json") == folder / "a" / "b.png"


@pytest.mark.parametrize("override", ["data.path=../../x", "data.path=/etc", "a=..", "..", "a=b/c", "a=\0"])
def test_overrides_become_one_folder(override):
    label = override_label([override])
    assert Path(label).name == label and label not in ("", ".", "..") and "\0" not in label
