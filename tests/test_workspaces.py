"""What the blocks of a launch on a GPU share: who has it to itself, and for how long. No GPU is needed to tell."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedvae import backend, functional
from fusedvae.backend import native

CPU = torch.device("cpu")


class Capture:
    """Whether a graph is being captured."""

    is_on = False


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    found = Capture()
    monkeypatch.setattr(native, "is_capturing", lambda: found.is_on)
    return found


class TestNative:
    @pytest.fixture(autouse=True)
    def _extension(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With three counters."""
        self.memory = torch.zeros(3, dtype=torch.int32)
        counters = self.memory.data_ptr(), len(self.memory)
        monkeypatch.setattr(native, "_C", SimpleNamespace(cuda_counters=lambda: counters))
        for name in ("_workspaces", "_counters", "_free_counters"):
            monkeypatch.setattr(native, name, {})

    def number(self, workspace: Any) -> int | None:
        """Which counter a workspace has of the extension's; None for one with a zero of its own."""
        sums, counter = workspace.sums, workspace.counter
        assert sums.data_ptr() == workspace.address
        assert workspace.address % 16 == 0
        number, rest = divmod(counter - self.memory.data_ptr(), 4)
        if rest == 0 and 0 <= number < len(self.memory):
            return number
        assert counter == sums.data_ptr() - 16
        assert int(sums._base[:4].view(torch.int32)) == 0
        return None

    def test_a_stream_keeps_its_own(self, capture: Capture):
        first, again, other = (native._workspace(CPU, stream, 100, is_kept=True) for stream in (1, 1, 2))
        assert [self.number(workspace) for workspace in (first, again, other)] == [0, 0, 1]
        assert first.sums is again.sums is not other.sums
        larger = native._workspace(CPU, 1, 1 << 20, is_kept=True)
        assert (self.number(larger), larger.sums.numel()) == (0, 1 << 20)
        assert native._workspace(CPU, 1, 100, is_kept=True).sums is larger.sums

    def test_what_is_not_to_be_kept_is_not(self, capture: Capture):
        """The counter is none of PyTorch's memory, of which alone a compiler that records graphs keeps account."""
        first, again = (native._workspace(CPU, 1, 100, is_kept=False) for _ in range(2))
        assert self.number(first) == self.number(again) == 0
        assert first.sums.data_ptr() != again.sums.data_ptr()
        assert native._workspaces == {}

    @pytest.mark.parametrize("is_kept", [True, False])
    def test_every_captured_launch_has_its_own(self, capture: Capture, is_kept: bool):
        native._workspace(CPU, 1, 100, is_kept=is_kept)
        capture.is_on = True
        found = [native._workspace(CPU, 1, 100, is_kept=is_kept) for _ in range(3)]
        assert [self.number(workspace) for workspace in found] == [1, 2, None]  # and there are no more
        assert len({workspace.sums.data_ptr() for workspace in found}) == 3
        capture.is_on = False
        assert self.number(native._workspace(CPU, 1, 100, is_kept=is_kept)) == 0
        assert self.number(native._workspace(CPU, 2, 100, is_kept=is_kept)) is None

    def test_threads_that_come_at_once_get_different_ones(self, capture: Capture, monkeypatch: pytest.MonkeyPatch):
        def slowly() -> tuple[int, int]:
            time.sleep(0.05)
            return self.memory.data_ptr(), len(self.memory)

        monkeypatch.setattr(native, "_C", SimpleNamespace(cuda_counters=slowly))
        with ThreadPoolExecutor(2) as pool:
            found = pool.map(lambda stream: native._workspace(CPU, stream, 100, is_kept=True), (1, 2))
            assert sorted(map(self.number, found)) == [0, 1]

    def test_a_first_call_that_is_captured_asks_for_nothing(self, capture: Capture, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(native, "_C", None)
        capture.is_on = True
        assert self.number(native._workspace(CPU, 1, 100, is_kept=True)) is None
        assert native._free_counters == {}


class TestTriton:
    @pytest.fixture(autouse=True)
    def _backend(self, monkeypatch: pytest.MonkeyPatch, capture: Capture) -> None:
        pytest.importorskip("triton")
        from fusedvae.backend.triton import launch

        self.launch = launch
        monkeypatch.setattr(launch, "_GRAPH_COUNTERS", 12)
        monkeypatch.setattr(launch, "_is_capturing", lambda device: capture.is_on)
        for name in ("_workspaces", "_graph_counters"):
            monkeypatch.setattr(launch, name, {})

    def workspace(self, counters: int, *, stream: int = 1, is_kept: bool = True) -> Any:
        found = self.launch._workspace(100, counters, CPU, stream, is_kept=is_kept)
        assert found.counters.numel() >= counters
        assert found.sums.numel() >= 100
        assert found.sums.data_ptr() % 16 == found.counters.data_ptr() % 16 == 0
        assert not found.counters.any()
        return found

    def memory(self) -> Tensor:
        (found,) = self.launch._graph_counters.values()
        return found

    def test_a_stream_keeps_its_own(self, capture: Capture):
        first, again, other = (self.workspace(5, stream=stream) for stream in (1, 1, 2))
        assert first is again is not other
        assert first.counters.data_ptr() != other.counters.data_ptr()
        assert len(self.memory()) == 12

    def test_what_is_not_to_be_kept_is_not(self, capture: Capture):
        first, again = (self.workspace(5, is_kept=False) for _ in range(2))
        assert first.counters.data_ptr() != again.counters.data_ptr()
        assert self.launch._workspaces == self.launch._graph_counters == {}

    def test_every_captured_launch_has_its_own(self, capture: Capture):
        self.workspace(5)
        start = self.memory().data_ptr()
        capture.is_on = True
        found = [self.workspace(count) for count in (5, 4, 1)]
        offsets = [workspace.counters.data_ptr() - start for workspace in found]
        assert offsets[:2] == [0, 32]  # in bytes: 5 take as much as 8
        assert not 0 <= offsets[2] < 48  # there are no more
        assert len({workspace.sums.data_ptr() for workspace in found}) == 3

    def test_a_first_call_that_is_captured_makes_nothing_to_stay(self, capture: Capture):
        capture.is_on = True
        self.workspace(5)
        assert self.launch._workspaces == self.launch._graph_counters == {}


class Dispatched(TorchDispatchMode):
    """Sees every operation, as a compiler does."""

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return operation(*arguments, **(options or {}))


@pytest.mark.skipif(backend.unavailable("native", "cpu") is not None, reason="no extension")
def test_behind_the_dispatcher_no_launch_keeps_memory(monkeypatch: pytest.MonkeyPatch, calls_anew: None) -> None:
    """A compiler that records launches in a CUDA graph owns all memory that is made meanwhile."""
    kept, launcher = [], native._launcher

    def recorded(*arguments: Any, keeps_workspace: bool = True) -> Any:
        kept.append(keeps_workspace)
        return launcher(*arguments, keeps_workspace=keeps_workspace)

    def step() -> None:
        recon_x, x, mu, logvar = (torch.randn(7, 11, requires_grad=k != 1) for k in range(4))
        for reduction in ("batchmean", "none"):
            functional.elbo_loss(recon_x, x, mu, logvar, reduction=reduction, backend="native").sum().backward()
        z, kl = functional.latent(mu, logvar, backend="native")
        (z.sum() + kl.sum()).backward()

    monkeypatch.setattr(native, "_launcher", recorded)
    step()
    assert set(kept) == {True}
    kept.clear()
    with Dispatched():
        step()
    assert len(kept) >= 5
    assert set(kept) == {False}
