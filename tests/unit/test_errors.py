"""Errors read as one paragraph and survive the way between processes."""

import pickle

import pytest

from flagdit.errors import CheckpointError, DataError, FlagDiTError, LaunchError, RecipeError


@pytest.mark.parametrize("kind", [RecipeError, DataError, CheckpointError, LaunchError])
def test_what_where_and_fix_make_one_paragraph(kind):
    error = kind("it is broken.", where="model.dim", fix="Mend it.")
    assert str(error) == "model.dim: it is broken. Mend it."
    assert isinstance(error, FlagDiTError)
    assert isinstance(error, ValueError)
    assert str(kind("it is broken")) == "it is broken"


def test_a_list_of_faults_is_followed_by_the_fix_on_its_own_line():
    assert str(DataError("two faults:\n  1. a\n  2. b", fix="Mend them.")) == "two faults:\n  1. a\n  2. b\nMend them."


def test_an_error_crosses_processes_with_its_parts():
    error = pickle.loads(pickle.dumps(DataError("broken", where="shard 3", fix="Mend it.")))
    assert (type(error), error.what, error.where, error.fix) == (DataError, "broken", "shard 3", "Mend it.")
    assert str(error) == "shard 3: broken. Mend it."
