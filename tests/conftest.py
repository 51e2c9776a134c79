"""What every test stands on: a clean Keras, a cache of its own, no thread left over."""

import gc
import tempfile
import threading
import zlib

import keras
import pytest
from hypothesis import settings

from loopscope.gear import GEARS

BACKEND = keras.backend.backend()

if BACKEND == "jax":
    # Many tests compile the same small programs: once is enough.
    import jax

    _COMPILED = tempfile.TemporaryDirectory(prefix="loopscope-tests-")
    jax.config.update("jax_compilation_cache_dir", _COMPILED.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


SHARED = (
    "data/test_arrays.py",
    "data/test_stream.py",
    "look/",
    "run/test_resume.py",
    "run/test_rewind.py",
    "test_bad_input.py",
    "test_bits.py",
    "test_choose.py",
    "test_features.py",
    "test_fit.py",
    "test_gears.py",
    "test_loop.py",
    "test_parity_contract.py",
    "test_parity_data.py",
    "test_parity_models.py",
    "test_state.py",
)
"""Files whose tests the backends share out: the quick suite has each on one of them."""


ON_TORCH = (
    "data/",
    "look/",
    "test_backend_contract.py",
    "test_bad_input.py",
    "test_bits.py",
    "test_discover.py",
    "test_features.py",
    "test_fit.py",
    "test_gears.py",
    "test_loop.py",
    "test_state.py",
    "test_torch.py",
    "test_trials.py",
    "test_workers_torch.py",
)
"""Files whose tests are made for PyTorch as well; the others know two backends."""


LATER_ON_TORCH = (
    "cli/test_launch.py",
    "run/test_large.py",
    "run/test_resume.py",
    "run/test_rewind.py",
    "test_examples.py",
    "test_programs.py",
    "test_workers.py",
)
"""As well, but processes that import PyTorch take long: left to the slow suite."""


OF_ONE = ("divided", "once", "skipif", "slow_on_jax")
"""Marks of tests that the quick suite may have on one of the backends only."""


def pytest_collection_modifyitems(items):
    """Leave to the slow suite what is slow here, or the share of another backend."""
    for item in items:
        if BACKEND == "torch" and _place(item).startswith(LATER_ON_TORCH):
            item.add_marker(pytest.mark.slow)
        elif BACKEND == "torch" and not _place(item).startswith(ON_TORCH):
            item.add_marker(pytest.mark.skip(reason="not made for PyTorch"))
        on_jax = item.get_closest_marker("slow_on_jax") is not None
        is_slow = on_jax and BACKEND == "jax"
        if is_slow or (_is_shared(item) and _share_of(item) != BACKEND):
            item.add_marker(pytest.mark.slow)


def _is_shared(item):
    """Whether the backends have this very test, and one of them is enough."""
    if any(item.get_closest_marker(name) is not None for name in OF_ONE):
        return False
    parameters = getattr(item, "callspec", None)
    values = parameters.params.values() if parameters is not None else ()
    # Which gears there are, and which of them are quick, the backends differ in.
    if any(isinstance(value, str) and value in GEARS for value in values):
        return False
    return _place(item).startswith(SHARED)


def _place(item):
    return item.nodeid.removeprefix("tests/")


def _share_of(item):
    """The backend that has it: PyTorch if it can, since most run there in no time."""
    shares = ["tensorflow", "jax", "torch", "torch", "torch"]
    if not _place(item).startswith(ON_TORCH):
        shares = ["tensorflow", "jax", "tensorflow", "jax", "jax"]
    return shares[zlib.crc32(item.nodeid.encode()) % len(shares)]


@pytest.fixture(autouse=True)
def clean_keras():
    """Names, seeds and the dtype policy start the same in each test."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    yield
    keras.config.set_dtype_policy(policy)
    keras.config.set_floatx(floatx)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """What `auto` has measured in one test is not known in the next."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LOOPSCOPE_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def no_doctor(monkeypatch):
    """`fit` looks into no step by itself: some hundred tests train for milliseconds."""
    monkeypatch.setenv("LOOPSCOPE_DOCTOR", "0")


@pytest.fixture(autouse=True)
def no_thread_left():
    """A test that leaves a prefetch thread behind fails."""
    before = set(threading.enumerate())
    yield
    gc.collect(0)
    left = [
        t for t in threading.enumerate() if t not in before and "loopscope" in t.name
    ]
    for thread in left:
        thread.join(2)
    assert not [t for t in left if t.is_alive()], "a source's thread outlived the test"
