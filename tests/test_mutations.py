"""The list of mechanisms that `make test-mutations` removes is up to date."""

from pathlib import Path

import pytest
from mutations.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.mechanism.replace(" ", "-"))
def test_a_mechanism_is_where_the_list_says_and_can_be_removed(mutant: Mutant) -> None:
    whole = (ROOT / mutant.file).read_text()
    assert whole.count(mutant.before) == 1
    compile(whole.replace(mutant.before, mutant.after), mutant.file, "exec")
    assert all((ROOT / test.partition("::")[0]).exists() for test in mutant.tests)
