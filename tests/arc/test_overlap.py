from __future__ import annotations

from dataclasses import replace

import pytest

from hybrid.arc import Overlap, Task, find_overlap

Sets = dict[str, list[Task]]
COPIES = {"0934a4d8", "136b0064", "16b78196", "981571dc", "aa4ec2a5", "da515329"}


def evaluated(links: tuple[tuple[str, str], ...]) -> set[str]:
    return {evaluation for _, evaluation in links}


def test_arc2_training_contains_most_of_arc1_evaluation(sets: Sets) -> None:
    overlap = find_overlap(sets["arc2-training"], sets["arc1-evaluation"])
    assert len(evaluated(overlap.leaks)) == 376
    assert len(evaluated(overlap.identical)) == 375
    assert evaluated(overlap.sharing) == evaluated(overlap.leaks)
    # ARC-2 corrected this one task.
    assert evaluated(overlap.leaks) - evaluated(overlap.identical) == {"ac0c5833"}
    assert all(training == evaluation for training, evaluation in overlap.leaks)


def test_arc2_training_contains_most_of_arc1_training(sets: Sets) -> None:
    overlap = find_overlap(sets["arc2-training"], sets["arc1-training"])
    assert overlap.leaks == overlap.identical == overlap.sharing
    same_id = [link for link in overlap.identical if link[0] == link[1]]
    renamed = [link for link in overlap.identical if link[0] != link[1]]
    assert len(same_id) == 391
    assert renamed == [("070dd51e", "40853293")], "comparing ids would miss this task"


def test_arc2_evaluation_contains_six_arc1_tasks_and_one_pair_of_another(sets: Sets) -> None:
    overlap = find_overlap(sets["arc1-evaluation"], sets["arc2-evaluation"])
    assert evaluated(overlap.identical) == COPIES == evaluated(overlap.leaks)
    assert evaluated(overlap.sharing) == COPIES | {"db695cfb"}
    assert overlap.leaking_tasks == COPIES
    assert ("55783887", "db695cfb") in overlap.sharing


@pytest.mark.parametrize("training", ["arc1-training", "arc2-training"])
def test_arc2_evaluation_does_not_overlap_with_training_sets(sets: Sets, training: str) -> None:
    overlap = find_overlap(sets[training], sets["arc2-evaluation"])
    assert overlap == Overlap(leaks=(), identical=(), sharing=(), evaluated=120)
    assert overlap.describe().startswith("0 of 120 evaluation tasks have a test pair")


def test_own_demonstrations_do_not_leak_own_tests(sets: Sets) -> None:
    """Training on demonstrations of evaluation tasks, as published, shares pairs but leaks none."""
    tasks = sets["arc2-evaluation"]
    transductive = find_overlap([task.without_answers() for task in tasks], tasks)
    assert transductive.leaks == () == transductive.identical
    assert transductive.sharing == tuple((task.id, task.id) for task in tasks)
    with_answers = find_overlap(tasks, tasks)
    assert len(with_answers.leaks) == len(with_answers.identical) == 120


def test_a_test_pair_among_demonstrations_leaks_regardless_of_id(toy: Task) -> None:
    own = replace(toy.test[0], output=toy.test[0].input)
    leaking = replace(toy, id="leaking", train=(own, toy.test[1]), test=(own,))
    overlap = find_overlap([leaking], [toy])
    assert overlap.leaks == overlap.sharing == (("leaking", "toy"),)
    assert overlap.identical == ()
    assert overlap.leaking_tasks == {"leaking"}
    clean = replace(leaking, train=(own, toy.train[0]))
    assert find_overlap([clean], [toy]).leaks == ()
    assert find_overlap([clean], [toy]).sharing == (("leaking", "toy"),)


def test_a_test_without_answer_leaks_by_its_input(toy: Task) -> None:
    blind = toy.without_answers()
    assert find_overlap([toy], [blind]).leaks == (("toy", "toy"),)
    # A training pair without an output is not trained on, so it leaks nothing.
    assert find_overlap([blind], [blind]).leaks == ()
    # If the answer is known, the same input alone is not a leak.
    other_answer = replace(toy, test=tuple(replace(p, output=p.input) for p in toy.test))
    assert find_overlap([other_answer], [toy]).leaks == ()


def test_description_is_three_short_lines_that_name_tasks(sets: Sets) -> None:
    overlap = find_overlap(sets["arc2-training"], sets["arc1-evaluation"])
    lines = overlap.describe().splitlines()
    assert len(lines) == 3 and all(len(line) < 200 for line in lines)
    assert lines[0].startswith("376 of 400") and lines[1].startswith("375 of 400")
    assert "00576224" in lines[0] and lines[0].endswith(", ...")
