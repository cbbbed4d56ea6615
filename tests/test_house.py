"""What holds over the whole repository: who may import whom, one source of versions, documents that stay true."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from moslora_core.versions import SUPPORTED

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ("commonsense_reasoning", "visual_instruction", "subject_driven_t2i")
FORBIDDEN = {
    "moslora_core": (*EXPERIMENTS, "analysis"),
    "analysis": EXPERIMENTS,
    **{name: (*(other for other in EXPERIMENTS if other != name), "analysis") for name in EXPERIMENTS},
}
HEAVY = ("diffusers", "lm_eval", "deepspeed", "matplotlib", "pandas", "datasets", "hydra")


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins(file: str) -> dict[str, str]:
    """Library -> its exact version in a file of constraints."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("package", [name for name in FORBIDDEN if (ROOT / name).is_dir()])
def test_dependency_rule(package):
    for path in (ROOT / package).rglob("*.py"):
        assert not imported(path) & set(FORBIDDEN[package]), path.relative_to(ROOT)


def test_importing_the_adapter_stays_light():
    code = f"import sys, moslora_core; sys.exit(', '.join(set({HEAVY}) & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"imported: {done.stderr}"


def test_environment_defers_to_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    assert [re.split("[=<>]", name)[0] for name in conda] == ["python", "pip"]
    assert pip["pip"][0] == "-c constraints.txt"
    (editable,) = pip["pip"][1:]
    extras = re.fullmatch(r"-e \.\[(.+)\]", editable).group(1).split(",")
    assert sorted(extras) == sorted(pyproject()["project"]["optional-dependencies"])
    python = next(name for name in conda if name.startswith("python=")).split("=")[1]
    assert Requirement(f"python{pyproject()['project']['requires-python']}").specifier.contains(python)


def test_constraints_pin_every_dependency_within_its_range():
    pinned = pins("constraints.txt")
    project = pyproject()["project"]
    for text in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        assert name in pinned, f"{name} has no exact version in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{text} excludes the pinned {pinned[name]}"


def test_the_import_checks_the_versions_that_the_metadata_names():
    requirements = {each.name: each.specifier for each in map(Requirement, pyproject()["project"]["dependencies"])}
    for library, supported in SUPPORTED.items():
        assert requirements[library] == SpecifierSet(supported), library


def test_the_oldest_constraints_are_the_first_supported_versions():
    oldest = pins("constraints-oldest.txt")
    for library, supported in SUPPORTED.items():
        lower = min(Version(bound.version) for bound in SpecifierSet(supported) if bound.operator == ">=")
        assert Version(oldest[library]) == lower, library
    pinned = pins("constraints.txt")
    assert all(pinned.get(name) != version for name, version in oldest.items()), "only what differs"


def test_makefile_installs_all_extras():
    (extras,) = re.findall(r"^EXTRAS := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(extras.split(",")) == sorted(pyproject()["project"]["optional-dependencies"])


DOCUMENTS = ("README.md", "experiments.md")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_of_the_documents_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), f"{document} links to {target}"


EXPERIMENT_PACKAGES = [name for name in EXPERIMENTS if (ROOT / name / "config.py").is_file()]
# Commands with options of their own, instead of Hydra's overrides.
WITH_OPTIONS = ("answer", "build_smoke_base", "convert", "export", "import_results")


def commands(document: str, experiment: str) -> list[list[str]]:
    """An experiment's command lines in a document, as (module, argument, ...)."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = re.findall(rf"-m ({experiment}\.\w+)([^`\n#|]*)", text)
    return [[module, *re.findall(r"'[^']*'|\S+", arguments)] for module, arguments in found]


@pytest.mark.parametrize("experiment", EXPERIMENT_PACKAGES)
def test_commands_of_the_documents_compose(experiment):
    """Every module exists, and every override that a document names is a key and value of the configuration."""
    from importlib import import_module

    from hydra import compose, initialize_config_module
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from moslora_core import launch

    config = import_module(f"{experiment}.config")
    launch.register(config.Config)
    named = [command for document in DOCUMENTS for command in commands(document, experiment)]
    assert named
    for module, *_ in named:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    arguments = {
        argument.strip("'")
        for module, *rest in named
        if module.split(".")[1] not in WITH_OPTIONS
        for argument in rest
        if "=" in argument and not argument.startswith("--")
    }
    overrides = set()
    for override in OverridesParser.create().parse_overrides(sorted(arguments)):
        if override.is_sweep_override():
            overrides.update(f"{override.key_or_group}={value}" for value in override.sweep_string_iterator())
        else:
            overrides.add(override.input_line)
    with initialize_config_module(config.CONF_MODULE, version_base="1.3"):
        for override in sorted(overrides):
            compose("config", overrides=[override])


def test_commands_of_the_analysis_and_the_adapter_exist():
    packages = ("analysis", "moslora_core")
    named = [command for document in DOCUMENTS for package in packages for command in commands(document, package)]
    assert named
    for module, *arguments in named:
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
        for argument in arguments:
            assert not argument.endswith(".yaml") or (ROOT / argument).is_file(), f"{module} {argument}"


def test_every_make_target_that_the_documents_name_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.M))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / document).read_text(encoding="utf-8"), flags=re.M))
        assert named <= targets, f"{document}: {named - targets}"
