"""What a study asks: which pairs, which checks, in which order and on which sides; and what its folder holds."""

from __future__ import annotations

from collections import Counter

import pytest
from PIL import Image

from moslora_core.errors import UserError
from moslora_core.record import RunRecord
from subject_driven_t2i.human_study.design import draw_study, write_study
from subject_driven_t2i.human_study.runs import find_arms
from subject_driven_t2i.human_study.study import IMAGES_FOLDER, differences, image_files, read_study, screens

from .study_runs import RED, SIZE, SUBJECTS, colour, place_data, place_run, place_runs, place_study, rewrite_manifest


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """A study of the paper's size, on four subjects."""
    return place_study(tmp_path_factory.mktemp("study"), SUBJECTS, prompts=8, checks=4)


def arms_of(root, subjects=("rex", "fizz"), seed=1):
    return find_arms(["method=moslora"], ["method=lora"], root / "runs", "smoke", subjects, seed)


def draw(root, subjects=("rex", "fizz"), **settings):
    return draw_study(*arms_of(root, subjects), **{"name": "test", **settings})


def pixel(folder, name):
    with Image.open(folder / IMAGES_FOLDER / name) as image:
        return image.getpixel((SIZE[0] // 2, SIZE[1] // 2))


def test_eight_prompts_of_every_subject_are_compared(paper):
    study = read_study(paper)
    pairs = [pair for pair in study.pairs if pair.kind == "pair"]
    assert Counter(pair.subject for pair in pairs) == dict.fromkeys(SUBJECTS, 8)
    assert len({(pair.subject, pair.prompt_index) for pair in pairs}) == 32
    prompts = [{pair.prompt_index for pair in pairs if pair.subject == subject} for subject in SUBJECTS]
    assert prompts.count(prompts[0]) < len(prompts)  # each subject has its own draw
    assert {pair.index for pair in pairs} == {0, 1}


def test_both_images_of_a_pair_show_the_same_prompt_and_number(paper):
    study = read_study(paper)
    for pair in study.pairs:
        if pair.kind == "pair":
            key = (pair.subject, pair.prompt_index, pair.index)
            assert [pixel(paper, name) for name in pair.images] == [colour("moslora", *key), colour("lora", *key)]
            assert pair.prompt == f"a {SUBJECTS[pair.subject]} in place {pair.prompt_index}"
            assert pair.expected == {}


def test_attention_checks_have_an_answer_that_is_right(paper):
    study = read_study(paper)
    checks = [pair for pair in study.pairs if pair.kind != "pair"]
    assert Counter(pair.kind for pair in checks) == {"same": 2, "other": 2}
    assert len({pair.subject for pair in checks}) == 4
    compared = {(pair.subject, pair.prompt_index, pair.index) for pair in study.pairs if pair.kind == "pair"}
    photographs = {subject: 10 + 40 * number for number, subject in enumerate(SUBJECTS)}
    for pair in checks:
        first, second = (pixel(paper, name) for name in pair.images)
        if pair.kind == "same":
            assert first == second and first[0] in RED.values() and first[1] == photographs[pair.subject]
            assert (pair.subject, pair.prompt_index, pair.index) not in compared
            assert pair.expected == {"subject_similarity": "tie", "prompt_consistency": "tie"}
        else:
            assert first[0] == second[0] == 0  # photographs
            assert first[1] == photographs[pair.subject] != second[1]
            assert pair.expected == {"subject_similarity": "first"}


def test_an_image_that_is_compared_is_no_attention_check_where_there_are_others(tmp_path):
    place_runs(tmp_path, ["rex"])
    for images, shared in ((1, 0), (2, 4)):  # of two images a prompt one is left over, or none
        study = draw(tmp_path, ["rex"], prompts=10, images_per_prompt=images, checks=4).study
        keys = {kind: [(p.prompt_index, p.index) for p in study.pairs if p.kind == kind] for kind in ("pair", "same")}
        assert sum(key in keys["pair"] for key in keys["same"]) == shared and len(keys["same"]) == 4


def test_one_subject_has_no_other_to_be_mistaken_for(tmp_path):
    place_runs(tmp_path, ["rex"])
    study = draw(tmp_path, ["rex"], checks=3).study
    assert [pair.kind for pair in study.pairs if pair.kind != "pair"] == ["same"] * 3


def test_pairs_are_those_of_the_seed(tmp_path):
    place_runs(tmp_path, ["rex", "fizz", "tom"])
    study = draw(tmp_path, seed=3).study
    assert differences(study, draw(tmp_path, seed=3).study) == []
    assert set(differences(study, draw(tmp_path, seed=4).study)) == {"seed", "pairs"}
    # A further subject changes nothing in the pairs of the others.
    more = draw(tmp_path, ["rex", "fizz", "tom"], seed=3).study
    of = [[(p.subject, p.prompt_index, p.index) for p in s.pairs if p.kind == "pair"] for s in (study, more)]
    assert of[1][: len(of[0])] == of[0]


def test_order_and_sides_are_shuffled_by_rater_and_seed(paper):
    study = read_study(paper)
    raters = [screens(study, number) for number in range(1, 16)]
    assert raters == [screens(study, number) for number in range(1, 16)]
    orders = {tuple(screen.pair for screen in rater) for rater in raters}
    sides = {tuple(sorted((screen.pair, screen.swapped) for screen in rater)) for rater in raters}
    assert len(orders) == len(sides) == 15
    kinds = {pair.id: pair.kind for pair in study.pairs}
    for rater in raters:
        assert sorted(screen.pair for screen in rater) == [pair.id for pair in study.pairs]
        assert sum(screen.swapped for screen in rater if kinds[screen.pair] == "pair") == 16
    # The side of a pair is no one's to guess: over many raters each pair is swapped about half of the time.
    swapped = Counter(s.pair for number in range(400) for s in screens(study, number) if s.swapped)
    assert all(140 < swapped[pair.id] < 260 for pair in study.pairs)
    places = Counter(screens(study, number)[0].pair for number in range(400))
    assert len(places) == len(study.pairs)


def test_files_say_nothing_of_where_they_come_from(paper):
    study = read_study(paper)
    files = sorted((paper / IMAGES_FOLDER).iterdir())
    assert {path.name for path in files} == {*image_files(study)}
    of_pairs = {name for pair in study.pairs for name in pair.images}
    for path in files:
        assert path.suffix == ".png" and len(path.stem) == 32 and int(path.stem, 16) >= 0
        content = path.read_bytes()
        assert b"lora" not in content and not {b"tEXt", b"iCCP", b"eXIf"} & {content[at : at + 4] for at in range(100)}
        with Image.open(path) as image:
            assert (image.format, image.mode, image.info) == ("PNG", "RGB", {})
            assert image.size == (SIZE if path.name in of_pairs else (60, 40))


def test_names_of_files_are_drawn_anew(tmp_path):
    place_runs(tmp_path, ["rex", "fizz"])
    names = [set(image_files(draw(tmp_path).study)) for _ in range(2)]
    assert not names[0] & names[1]


def test_a_study_reads_back_as_it_was_written(tmp_path):
    place_runs(tmp_path, ["rex", "fizz"])
    draft = draw(tmp_path, prompts=3, images_per_prompt=2)
    write_study(tmp_path / "study", draft)
    assert read_study(tmp_path / "study") == draft.study
    assert len(draft.study.pairs) == 2 * 3 * 2 + 4


def test_images_of_two_sizes_are_refused(tmp_path):
    place_data(tmp_path / "data")
    place_run(tmp_path, "moslora", "rex")
    place_run(tmp_path, "lora", "rex", size=(24, 24))
    with pytest.raises(UserError, match="expected images of one size"):
        draw(tmp_path, ["rex"])


def test_an_image_that_was_exchanged_is_refused(tmp_path):
    place_runs(tmp_path, ["rex"])
    record = RunRecord(tmp_path / "runs/subject_driven_t2i/smoke/lora/data.subject=rex/seed-1")
    rewrite_manifest(record, lambda rows: [row.update(sha256="0" * 64) for row in rows])
    with pytest.raises(UserError, match=r"has sha256 .*, expected 000000000000\.\.\. as in images.jsonl"):
        draw(tmp_path, ["rex"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"prompts": 11}, "images of 10 prompts; --prompts asks for 11"),
        ({"prompts": 0}, "--prompts 0: expected at least 1"),
        ({"images_per_prompt": 3}, "2 images of prompt"),
        ({"checks": -1}, "--checks -1: expected at least 0"),
    ],
)
def test_more_than_there_is_cannot_be_asked_for(tmp_path, settings, expected):
    place_runs(tmp_path, ["rex"])
    with pytest.raises(UserError, match=expected):
        draw(tmp_path, ["rex"], **settings)


def test_a_subject_that_was_not_prepared_is_named(tmp_path):
    place_runs(tmp_path, ["rex"])
    place_data(tmp_path / "data", {"fizz": "can"})
    with pytest.raises(UserError, match="no subject rex; it has fizz"):
        draw(tmp_path, ["rex"])


def test_a_study_is_written_whole_or_not_at_all(tmp_path):
    place_runs(tmp_path, ["rex", "fizz"])
    draft = draw(tmp_path)
    path = next(iter(draft.compared.values()))
    good = path.read_bytes()
    path.write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot be read as an image"):
        write_study(tmp_path / "studies" / "one", draft)
    assert list((tmp_path / "studies").iterdir()) == []
    path.write_bytes(good)
    write_study(tmp_path / "studies" / "one", draft)
    with pytest.raises(UserError, match="holds something else"):
        write_study(tmp_path / "studies" / "one", draft)
