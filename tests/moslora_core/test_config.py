"""``MoSLoraConfig``: what it accepts, what it refuses and how it says so, and its file."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, EvaConfig, LoraConfig, PeftConfig, TaskType
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft.utils.other import get_pattern_key

from moslora_core import MOSLORA, MoSLoraConfig, UserError
from moslora_core.config import MIXERS
from moslora_core.mixer import MIXER_INITS

# ------------------------------------------------------------------------------------------------------------ accepted


STARTS = [
    (mixer, init) for mixer in ("learned", "frozen") for init in MIXER_INITS if (mixer, init) != ("frozen", "zero")
]


@pytest.mark.parametrize("mixer, init", STARTS)
def test_every_start_of_a_mixer(mixer, init):
    config = MoSLoraConfig(mixer=mixer, mixer_init=init)
    assert config.mixer_of("q_proj").start == init
    assert config.has_mixer == ((mixer, init) != ("frozen", "identity"))
    assert config.trains_mixer == (mixer == "learned")


@pytest.mark.parametrize("settings", [{"r": 2}, {"r": 6, "rank_pattern": {"q_proj": 4}}])
def test_two_subspaces_at_even_ranks(settings):
    config = MoSLoraConfig(mixer="two_subspaces", **settings)
    assert (config.mixer_of("v_proj").start, config.has_mixer, config.trains_mixer) == ("two_subspaces", True, False)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_starts_of_a_and_b(init):
    assert MoSLoraConfig(init_lora_weights=init).init_lora_weights == init


def test_naming_the_fixed_matrix_twice_is_no_contradiction():
    assert MoSLoraConfig(mixer="identity", mixer_init="identity").mixer_of("q_proj").start == "identity"


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva", "eva_config": EvaConfig()},
        {"target_parameters": ["experts.weight"]},
        {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)},
        {"kasa_config": KasaConfig()},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("mixer", [{"mixer": "identity"}, {"mixer": "frozen", "mixer_init": "identity"}])
def test_plain_lora_keeps_all_of_lora(mixer, settings):
    assert not MoSLoraConfig(**mixer, **settings).has_mixer


@pytest.mark.parametrize("settings", [{}, {"mixer": "identity"}], ids=["learned", "identity"])
def test_a_pattern_gives_modules_their_own_mixer(settings):
    pattern = {"vision.*": "identity", r"layers\.0\.q_proj": "frozen", "q_proj|v_proj": "two_subspaces"}
    config = MoSLoraConfig(mixer_init="orthogonal", mixer_seed=3, mixer_pattern=pattern, **settings)
    default = config.mixer
    expected = {
        "vision.layers.0.q_proj": "identity",
        "model.vision.fc": "identity",
        "model.layers.0.q_proj": "frozen",
        "model.layers.1.q_proj": "two_subspaces",
        "v_proj": "two_subspaces",
        "model.layers.10.k_proj": default,
        "model.xlayers.0.v_proj_extra": default,
    }
    found = {module: config.mixer_of(module) for module in expected}
    assert {module: setting.mixer for module, setting in found.items()} == expected
    starts = {"learned": "orthogonal", "frozen": "orthogonal"}
    for setting in found.values():
        assert (setting.exists, setting.trains) == (setting.mixer != "identity", setting.mixer == "learned")
        assert (setting.start, setting.seed) == (starts.get(setting.mixer, setting.mixer), 3)
    assert config.has_mixer and config.trains_mixer == (default == "learned")


@given(
    st.lists(st.sampled_from(["q", "q|k", "a.q", r"a\.q", "a.*", "^a.q", r"b\.\d+\..*", "k$", ""]), max_size=4),
    st.lists(st.sampled_from(["a", "b", "q", "k", "aq", "0", "11"]), min_size=1, max_size=4).map(".".join),
)
def test_patterns_are_matched_as_peft_matches_its_own(keys, module):
    pattern = dict.fromkeys(keys, "identity")
    key = get_pattern_key(pattern, module)
    assert MoSLoraConfig(mixer_pattern=pattern).mixer_of(module).mixer == pattern.get(key, "learned")


@pytest.mark.parametrize(
    ("settings", "has", "trains"),
    [
        ({"mixer": "identity", "mixer_pattern": {"q_proj": "learned"}, "mixer_init": "orthogonal"}, True, True),
        ({"mixer": "identity", "mixer_pattern": {"q_proj": "two_subspaces"}}, True, False),
        ({"mixer": "learned", "mixer_pattern": {".*": "identity"}}, True, True),  # any module may turn up
        ({"mixer": "frozen", "mixer_init": "identity", "mixer_pattern": {"q_proj": "identity"}}, False, False),
        ({"mixer": "frozen", "mixer_init": "identity", "mixer_pattern": {"q_proj": "learned"}}, True, True),
        ({"mixer": "identity", "mixer_pattern": {"q_proj": "identity"}, "init_lora_weights": "pissa"}, False, False),
    ],
)
def test_what_a_pattern_adds_up_to(settings, has, trains):
    config = MoSLoraConfig(**settings)
    assert (config.has_mixer, config.trains_mixer) == (has, trains)


@pytest.mark.parametrize(
    "settings",
    [
        {"mixer": "two_subspaces", "r": 3, "rank_pattern": {"llm.*": 4}, "mixer_pattern": {"vision.*": "identity"}},
        {"r": 4, "rank_pattern": {"q_proj": 3}, "mixer_pattern": {"v_proj": "two_subspaces"}},
        {"r": 3, "rank_pattern": {"v_proj": 4}, "mixer_pattern": {"v_proj": "two_subspaces"}},
    ],
)
def test_odd_ranks_are_for_modules_that_do_not_pair_them(settings):
    assert MoSLoraConfig(**settings).has_mixer


# ------------------------------------------------------------------------------------------------------------- refused

REFUSED = {
    "mixer": ({"mixer": "butterfly"}, r"mixer='butterfly' is unknown; expected one of learned, frozen, identity"),
    "mixer_init": ({"mixer_init": "xavier"}, r"mixer_init='xavier' is unknown; expected one of kaiming_uniform"),
    "negative seed": ({"mixer_seed": -1}, r"mixer_seed must be a non-negative integer or None, found -1"),
    "fractional seed": ({"mixer_seed": 0.5}, r"mixer_seed .* found 0\.5"),
    "true as seed": ({"mixer_seed": True}, r"mixer_seed .* found True"),
    "odd rank": ({"mixer": "two_subspaces", "r": 7}, r"r must be even, found 7"),
    "odd rank in the pattern": (
        {"mixer": "two_subspaces", "rank_pattern": {"q_proj": 4, "v_proj": 5}},
        r"rank_pattern\['v_proj'\] must be even, found 5",
    ),
    "identity with a start": (
        {"mixer": "identity", "mixer_init": "orthogonal"},
        r"mixer='identity' is a fixed matrix, so mixer_init='orthogonal' has no effect",
    ),
    "two subspaces with a start": (
        {"mixer": "two_subspaces", "mixer_init": "identity"},
        r"mixer='two_subspaces' is a fixed matrix, so mixer_init='identity' has no effect",
    ),
    "frozen zero": ({"mixer": "frozen", "mixer_init": "zero"}, r"mixer_init='zero' keeps the update at .* forever"),
    "a mixer in the pattern": (
        {"mixer_pattern": {"q_proj": "butterfly"}},
        r"mixer_pattern\['q_proj'\]='butterfly' is unknown; expected one of learned",
    ),
    "a list as pattern": ({"mixer_pattern": ["q_proj"]}, r"mixer_pattern must map .* found \['q_proj'\]"),
    "no pattern": ({"mixer_pattern": None}, r"mixer_pattern must map .* found None"),
    "a broken expression": ({"mixer_pattern": {"(q": "identity"}}, r"mixer_pattern: '\(q' is no regular expression"),
    "a number as key": ({"mixer_pattern": {3: "identity"}}, r"mixer_pattern: 3 is no regular expression"),
    "odd rank for the pattern": (
        {"r": 3, "mixer_pattern": {"q_proj": "two_subspaces"}},
        r"r must be even, found 3",
    ),
    "odd rank under the same key": (
        {"rank_pattern": {"q_proj": 5}, "mixer_pattern": {"q_proj": "two_subspaces"}},
        r"rank_pattern\['q_proj'\] must be even, found 5",
    ),
    "odd rank outside the pattern": (
        {"mixer": "two_subspaces", "r": 3, "mixer_pattern": {"q_proj": "identity"}},
        r"r must be even, found 3",
    ),
    "a start for fixed matrices alone": (
        {"mixer": "identity", "mixer_init": "orthogonal", "mixer_pattern": {"q_proj": "two_subspaces"}},
        r"mixer='identity' is a fixed matrix, so mixer_init='orthogonal' has no effect",
    ),
    "frozen zero in the pattern": (
        {"mixer": "identity", "mixer_init": "zero", "mixer_pattern": {"q_proj": "frozen"}},
        r"mixer_pattern\['q_proj'\]='frozen' with mixer_init='zero' keeps",
    ),
    "PiSSA beside the pattern": (
        {"mixer": "identity", "mixer_pattern": {"q_proj": "frozen"}, "init_lora_weights": "pissa"},
        r"init_lora_weights='pissa' cannot be combined with mixer_pattern\['q_proj'\]='frozen': PiSSA",
    ),
    "QA-LoRA beside the pattern": (
        {"mixer": "identity", "mixer_pattern": {"q_proj": "learned"}, "use_qalora": True},
        r"use_qalora cannot be combined with mixer_pattern\['q_proj'\]='learned': QA-LoRA",
    ),
    "target_parameters": ({"target_parameters": ["experts.weight"]}, r"target_parameters cannot be combined"),
    "BD-LoRA": ({"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)}, r"use_bdlora .*BD-LoRA"),
    "BD-LoRA as in a file": ({"use_bdlora": {"target_modules_bd_a": ["q"], "nblocks": 2}}, r"use_bdlora .*BD-LoRA"),
    "QA-LoRA": ({"use_qalora": True}, r"use_qalora .*QA-LoRA"),
    "Arrow": ({"arrow_config": ArrowConfig()}, r"arrow_config .*Arrow"),
    "KaSA": ({"kasa_config": KasaConfig()}, r"kasa_config .*KaSA"),
    "MonteCLoRA": ({"monteclora_config": MontecloraConfig()}, r"monteclora_config .*MonteCLoRA"),
    "VeLoRA": ({"velora_config": VeloraConfig()}, r"velora_config .*VeLoRA"),
    "Megatron": ({"megatron_config": {"tensor_model_parallel_size": 2}}, r"megatron_config .*Megatron"),
    "EVA": ({"init_lora_weights": "eva", "eva_config": EvaConfig()}, r"'eva' .*EVA replaces A"),
    "OLoRA": ({"init_lora_weights": "olora"}, r"'olora' .*OLoRA"),
    "PiSSA": ({"init_lora_weights": "pissa"}, r"'pissa' .*PiSSA"),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_4"}, r"'pissa_niter_4' .*PiSSA"),
    "CorDA": ({"init_lora_weights": "corda"}, r"'corda' .*CorDA"),
    "LoftQ": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, r"'loftq' .*LoftQ"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}, r"'lora_ga' .*LoRA-GA"),
    "orthogonal A and B": ({"init_lora_weights": "orthogonal"}, r"'orthogonal' .*B @ A = 0"),
    "MiCA": ({"init_lora_weights": "mica"}, r"'mica' .*MiCA"),
    "an initialisation of the future": ({"init_lora_weights": "novel"}, r"'novel' .*not known; use True, False or"),
}


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'corda'")
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'")
@pytest.mark.parametrize("settings, message", REFUSED.values(), ids=REFUSED)
def test_refused_with_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        MoSLoraConfig(**settings)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mixer", ["learned", "frozen", "two_subspaces"])
def test_every_mixer_refuses_what_is_not_b_a(mixer):
    with pytest.raises(UserError, match=f"init_lora_weights='pissa' cannot be combined with mixer='{mixer}'"):
        MoSLoraConfig(mixer=mixer, init_lora_weights="pissa")


def test_every_member_of_the_lora_family_is_decided():
    """A variant that a new version of PEFT adds must be looked at before a mixer is let into it."""
    variants = {field.name for field in fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert variants == {
        "use_dora",
        "alora_invocation_tokens",
        "use_bdlora",
        "arrow_config",
        "kasa_config",
        "monteclora_config",
        "velora_config",
    }


def test_a_zero_start_warns(caplog):
    with caplog.at_level(logging.WARNING, logger="moslora_core"):
        MoSLoraConfig(mixer_init="zero", inference_mode=True)
        MoSLoraConfig(mixer_init="identity")
        assert not caplog.records
        MoSLoraConfig(mixer_init="zero")
        assert "gradients of A, B and the mixer all vanish" in caplog.text
        caplog.clear()
        MoSLoraConfig(mixer="identity", mixer_init="zero", mixer_pattern={"q_proj": "learned"})
    assert "gradients of A, B and the mixer all vanish" in caplog.text


def test_lora_keeps_its_own_checks():
    with pytest.raises(ValueError, match="layers_pattern"):
        MoSLoraConfig(layers_pattern="layers")


# ---------------------------------------------------------------------------------------------------------------- file


@pytest.mark.parametrize("mixer", MIXERS)
def test_file_round_trip(mixer, tmp_path):
    config = MoSLoraConfig(
        mixer=mixer,
        mixer_seed=3,
        r=6,
        lora_alpha=12,
        use_dora=True,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 4},
        mixer_pattern={"vision.*": "identity", "v_proj": "learned"},
        task_type=TaskType.CAUSAL_LM,
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["mixer"], written["mixer_seed"]) == ("MOSLORA", mixer, 3)
    for cls in (PeftConfig, MoSLoraConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is MoSLoraConfig
        assert loaded.to_dict() == config.to_dict()


def test_a_file_from_before_patterns_is_read(tmp_path):
    MoSLoraConfig(r=6).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    assert written.pop("mixer_pattern") == {}
    path.write_text(json.dumps(written))
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == MoSLoraConfig(r=6).to_dict()


def test_a_damaged_file_is_refused(tmp_path):
    MoSLoraConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"learned"', '"lerned"'))
    with pytest.raises(UserError, match="mixer='lerned' is unknown"):
        PeftConfig.from_pretrained(tmp_path)


def test_copies_and_replacements():
    config = MoSLoraConfig(r=6, mixer_seed=1)
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    assert replace(config, r=8).r == 8
    assert config.peft_type is MOSLORA
    assert isinstance(config, LoraConfig)
    assert not isinstance(AdaLoraConfig(total_step=1), MoSLoraConfig)


def test_every_setting_has_help():
    own = {field.name: field.metadata for field in fields(MoSLoraConfig)}
    assert all(own[name].get("help") for name in ("mixer", "mixer_init", "mixer_seed", "mixer_pattern"))


# ------------------------------------------------------------------------------------------------------------- imports


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)


def test_the_package_imports_no_experiment():
    heavy = ["diffusers", "lm_eval", "hydra", "omegaconf", "pandas", "matplotlib", "deepspeed", "datasets", "scipy"]
    others = ["commonsense_reasoning", "visual_instruction", "subject_driven_t2i", "analysis"]
    # What PEFT itself brings is not for us to avoid.
    done = run_python(
        f"import sys, peft; before = set(sys.modules); import moslora_core; new = set(sys.modules) - before; "
        f"found = [m for m in {heavy + others} if m in new]; sys.exit(' '.join(found) or None)"
    )
    assert done.returncode == 0, done.stderr


def test_a_process_without_the_package_fails_on_the_type(tmp_path):
    """Instead of loading the adapter as LoRA without its mixers."""
    MoSLoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    done = run_python(f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})")
    assert done.returncode != 0
    assert "MOSLORA" in done.stderr.splitlines()[-1]
