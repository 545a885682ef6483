"""Randomness as a function: equal names give equal draws, whatever was drawn before or beside them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch

from vae.random import IdDraws, StepDraws, generator, permutation, stable_hash


def test_hash_is_the_same_in_another_process() -> None:
    code = "from vae.random import stable_hash; print(stable_hash(3, 'noise', 'é/1'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(stable_hash(3, "noise", "é/1"))


def test_draws_are_those_of_philox_with_the_hash_as_its_key() -> None:
    key = int.from_bytes(stable_hash(3, "noise", "a"), "little")
    expected = np.random.Generator(np.random.Philox(key=key)).standard_normal(5, dtype=np.float32)
    assert np.array_equal(IdDraws(3, ["a"]).normal("noise", 5)[0].numpy(), expected)


def test_seed_stream_and_name_each_change_the_draw() -> None:
    draws = {stable_hash(seed, s, name) for seed in (0, 1) for s in ("a", "b") for name in (0, 1)}
    assert len(draws) == 8


def test_step_draws_depend_on_their_names_alone() -> None:
    first = StepDraws(0, 5, rows=4)
    torch.rand(7)
    again = StepDraws(0, 5, rows=4)
    again.uniform("binarize", 3)
    assert torch.equal(first.normal("posterior", 2), again.normal("posterior", 2))
    assert not torch.equal(first.normal("posterior", 2), StepDraws(0, 6, rows=4).normal("posterior", 2))


def test_id_draws_do_not_depend_on_the_batch() -> None:
    ids = [f"train/{i}.png" for i in range(10)]
    whole = IdDraws(1, ids).normal("posterior", 4)
    parts = [IdDraws(1, ids[i : i + 3]).normal("posterior", 4) for i in range(0, 10, 3)]
    assert torch.equal(whole, torch.cat(parts))
    turned = IdDraws(1, ids[::-1]).normal("posterior", 4)
    assert torch.equal(whole, turned.flip(0))


def test_id_draws_of_integers_and_their_text_agree() -> None:
    assert torch.equal(IdDraws(0, [1, 2]).uniform("a", 2), IdDraws(0, ["1", "2"]).uniform("a", 2))


def test_draws_are_standard() -> None:
    normal = IdDraws(0, range(2000)).normal("n", 50).double()
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.02
    uniform = IdDraws(0, range(2000)).uniform("u", 50)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01


def test_permutation_visits_every_image_once_and_changes_with_the_epoch() -> None:
    first, second = permutation(0, 0, 1000), permutation(0, 1, 1000)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert not torch.equal(first, second)


def test_generator_leaves_the_global_one_alone() -> None:
    before = torch.random.get_rng_state()
    torch.rand(3, generator=generator(0, "x", 0))
    assert torch.equal(before, torch.random.get_rng_state())
