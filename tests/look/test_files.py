"""An opened step as a file and as HTML: everything is in it, and nothing runs in it."""

import json
import re
from dataclasses import replace

import keras
import numpy as np
import pytest
from keras import layers
from looking import by_path

from loopscope.errors import UsageError
from loopscope.look import html
from loopscope.look.opened import Change, NonFinite
from loopscope.look.pictures import pictures, png
from models import FUSED, blobs, fresh, numbers, small_loop

# What is tested here is the same on every backend.
pytestmark = pytest.mark.slow_on_jax

X, Y = blobs(8)


@pytest.fixture(scope="module")
def step():
    return fresh(small_loop, FUSED).look(X, Y)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_every_array_is_in_the_file(step, suffix, tmp_path):
    path = tmp_path / f"step{suffix}"
    step.save(path)
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            found = dict(file)
        about = json.loads(str(found.pop("about")))
    else:
        from safetensors import safe_open

        with safe_open(path, "numpy") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads(file.metadata()["about"])
    np.testing.assert_array_equal(found["batch/x"], X)
    np.testing.assert_array_equal(found["loss_per_example"], step.loss_per_example)
    for output in step.layers:
        np.testing.assert_array_equal(found[f"layers/{output.path}"], output.values)
    for gradient in step.gradients:
        np.testing.assert_array_equal(
            found[f"gradients/{gradient.path}"], gradient.values
        )
    for path_, change in step.optimizer.items():
        np.testing.assert_array_equal(found[f"optimizer/{path_}/after"], change.after)
    assert about == json.loads(json.dumps(step.as_dict()))


def test_a_page_shows_the_step_and_asks_for_nothing_from_elsewhere(step, tmp_path):
    path = tmp_path / "step.html"
    step.save(path)
    text = path.read_text("utf-8")
    assert f"Step {step.step}" in text
    for output in step.layers:
        assert output.path in text
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", text)
    assert "<script" not in text
    assert html.fragment(step) in text


def test_names_cannot_write_into_the_page(step):
    hostile = "<script>alert(1)</script>"
    layers_ = [replace(o, path=hostile) for o in step.layers]
    gradients = [replace(g, path=hostile) for g in step.gradients]
    batch = {"x": step.batch["x"]}
    spoilt = replace(
        step,
        layers=layers_,
        gradients=gradients,
        batch=batch,
        losses={hostile: 1.0},
        phases={hostile: 1.0},
        missing=[hostile],
        metrics={hostile: Change(np.zeros(1), np.zeros(1))},
        first_nonfinite=NonFinite("operation", hostile, hostile),
        labels=[np.array([hostile] * 8)],
    )
    assert hostile in str(spoilt.first_nonfinite)
    assert "<script" not in spoilt._repr_html_()


def test_a_name_that_says_no_kind_of_file_is_refused(step, tmp_path):
    with pytest.raises(UsageError, match=r"\.npz, \.safetensors, \.html"):
        step.save(tmp_path / "step.pickle")
    with pytest.raises(UsageError, match="no folder"):
        step.save(tmp_path / "nowhere" / "step.npz")
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_saved_as_float32(tmp_path):
    def make(gear):
        keras.config.set_dtype_policy("mixed_bfloat16")
        return small_loop(gear)

    step = fresh(make, FUSED).look(X, Y)
    assert step.layers[0].dtype == "bfloat16"
    step.save(tmp_path / "step.npz")
    with np.load(tmp_path / "step.npz", allow_pickle=False) as file:
        for path, output in by_path(step.layers).items():
            assert file[f"layers/{path}"].dtype == np.float32
            np.testing.assert_array_equal(
                file[f"layers/{path}"], output.values.astype("float32")
            )


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 28, 28), (3, 28, 28, 1)),
        ((3, 28, 28, 1), (3, 28, 28, 1)),
        ((3, 9, 7, 3), (3, 9, 7, 3)),
        ((3, 784), (3, 28, 28, 1)),
        ((3, 9), None),
        ((3, 785), None),
        ((3, 9, 7, 5), None),
        ((3,), None),
    ],
)
def test_pictures_are_told_by_their_shape(shape, expected):
    found = pictures(numbers(*shape))
    if expected is None:
        assert found is None
    else:
        assert found.shape == expected
        assert (found.min(), found.max()) == (0, 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_can_be_read_by_others(channels):
    image = pytest.importorskip("matplotlib.image")
    import io

    shown = pictures(numbers(2, 5, 7, channels))
    read = image.imread(io.BytesIO(png(shown[0])), format="png")
    again = np.rint(255 * read.reshape(5, 7, -1)[..., :channels]).astype("uint8")
    np.testing.assert_array_equal(again, shown[0])


def test_one_example_of_huge_numbers_leaves_the_others_visible():
    usual = np.tile(np.linspace(0, 1, 16 * 16, dtype="float32"), (5, 1))
    usual[3] *= 1000
    shown = pictures(usual)
    assert (shown.reshape(5, -1).max(axis=1) == 255).all()
    assert 100 < shown[0].mean() < 150 < shown[3].mean()


def test_pictures_are_shown_worst_first():
    model = keras.Sequential([keras.Input((784,)), layers.Dense(3)])
    step = fresh(lambda gear: small_loop(gear, model=model), FUSED).look(
        numbers(8, 784), Y
    )
    text = step._repr_html_()
    order = [int(n) for n in re.findall(r'alt="example (\d+)"', text)]
    assert order == step.worst.tolist()
