"""Every backend on a CPU: the flash kernels through stand-ins for their packages."""

import sys

import flash_stand_ins
import pytest

from flagdit.model.attention_backends import BACKENDS, flash


@pytest.fixture(scope="session")
def flash3_operators():
    return flash_stand_ins.flash3()


@pytest.fixture(params=[b.name for b in BACKENDS])
def backend(request, monkeypatch, flash3_operators):
    """A backend that runs here."""
    monkeypatch.setattr(flash, "_aten", flash_stand_ins.aten())
    stand_ins = (flash_stand_ins.flash2(), flash3_operators[0], flash_stand_ins.flash4())
    for module in stand_ins:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    flash_stand_ins.calls.clear()
    (found,) = (b for b in BACKENDS if b.name == request.param)
    yield found
    if found.name != "sdpa":
        assert {call.split()[0] for call in flash_stand_ins.calls} <= {found.name}
