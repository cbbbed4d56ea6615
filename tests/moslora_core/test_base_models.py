"""Finding, loading and making base models: folders, packages, hub ids, and many processes at once."""

from __future__ import annotations

import threading
import time

import pytest

from moslora_core import base_models
from moslora_core.base_models import loading, local_folder, made_once, quantization_config, weights_dtype
from moslora_core.errors import UserError


def test_a_local_folder_and_one_of_a_package_are_taken_as_they_are(tmp_path):
    assert local_folder(str(tmp_path)) == tmp_path
    assert (local_folder("package:moslora_core/deepspeed") / "zero2.json").is_file()


def test_anything_else_is_a_hub_id(tmp_path, monkeypatch):
    asked = []

    def download(name: str, revision: str | None) -> str:
        asked.append((name, revision))
        if name == "no/model":
            raise OSError("Repository Not Found\nfor url")
        return str(tmp_path)

    monkeypatch.setattr(base_models, "snapshot_download", download)
    assert local_folder("some/model", "v1") == tmp_path and asked == [("some/model", "v1")]
    with pytest.raises(UserError, match=r"^model\.llm=no/model: Repository Not Found for url$"):
        local_folder("no/model", key="model.llm")


def test_one_of_many_makes_a_model_and_the_others_wait(tmp_path):
    target, made, seen = tmp_path / "models" / "one", [], []

    def use(number: int) -> None:
        with made_once(target) as missing:
            if missing:
                made.append(number)
                time.sleep(0.1)
                target.mkdir()
                (target / "config.json").write_text("{}")
        seen.append((target / "config.json").exists())

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and seen == [True] * 4


def test_a_failed_making_is_made_by_the_next(tmp_path):
    target = tmp_path / "one"
    with pytest.raises(RuntimeError), made_once(target) as missing:
        assert missing
        raise RuntimeError
    with made_once(target) as missing:
        assert missing


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/models/one"), made_once(tmp_path / "file/models/one"):
        pass


def test_failures_of_loading_are_one_line():
    def fail() -> None:
        raise ValueError("\nfirst line\nsecond line")

    with pytest.raises(UserError) as caught:
        loading(fail, "model.path=x")
    assert str(caught.value) == "model.path=x: first line second line"


def test_names_of_dtypes_and_quantisations_are_checked():
    assert weights_dtype("auto") == "auto" and quantization_config("none", "auto") is None
    assert quantization_config("nf4", "auto", skip=["lm_head"]).bnb_4bit_use_double_quant
    for call in (lambda: weights_dtype("fp8"), lambda: quantization_config("int4", "auto")):
        with pytest.raises(UserError, match=r"^model\.(dtype|quantization) must be"):
            call()


def test_a_gguf_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"model\.gguf_file=x\.gguf: not found in"):
        base_models.from_gguf(str(tmp_path), "x.gguf", str(tmp_path / "models"))
    assert not (tmp_path / "models" / "x").exists()
