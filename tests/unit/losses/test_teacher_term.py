"""The teacher's term and the average of weights, against what their formulas say, written by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from torch.nn.functional import normalize

from arf_plugin.data.batch import OptimizerStep
from arf_plugin.errors import FlagError
from arf_plugin.losses.average import WeightAverage, step_weights
from arf_plugin.losses.teacher import IMAGE, TEXT, TeacherLoss, frozen_copy

STEPS = 7


@pytest.fixture(scope="module")
def density() -> np.ndarray:
    """Beta(1/2, 1/2) at every step, by scipy."""
    from scipy.stats import beta

    return beta.pdf((np.arange(STEPS + 1) + 0.5) / (STEPS + 1), 0.5, 0.5)


def network(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(dtype)


def walk(model: torch.nn.Module, step: int) -> None:
    """Moves a model's weights and statistics."""
    torch.manual_seed(step)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape).to(parameter.dtype)
    model(torch.randn(5, 3).to(parameter.dtype))


def test_weights_of_steps_are_shares_of_the_density(density):
    """w_0 is 1, and every average weighs the weights so far by their densities."""
    np.testing.assert_allclose(step_weights(STEPS), density / density.cumsum(), rtol=1e-14)
    assert step_weights(STEPS)[0] == 1


def test_the_average_is_the_weighted_mean_of_all_weights_and_has_the_newest_statistics(density):
    student = network()
    average = WeightAverage(frozen_copy(student), student, STEPS)
    seen = []
    for step in range(STEPS + 1):
        if step:
            walk(student, step)
        average.update(step)
        seen.append([p.detach().clone() for p in student.parameters()])
        shares = density[: step + 1] / density[: step + 1].sum()
        for number, found in enumerate(average.model.parameters()):
            mean = sum(share * weights[number] for share, weights in zip(shares, seen, strict=True))
            torch.testing.assert_close(found, mean, rtol=0, atol=1e-12)
        for found, newest in zip(average.model.buffers(), student.buffers(), strict=True):
            assert torch.equal(found, newest)
    assert not average.model.training and not any(p.requires_grad for p in average.model.parameters())
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_an_average_goes_on_bitwise_from_its_state(dtype):
    """Low precision is averaged in float32, which the state keeps."""
    student = network(dtype)
    whole = WeightAverage(frozen_copy(student), student, STEPS)
    whole.update(0)
    for step in (1, 2):
        walk(student, step)
        whole.update(step)
    state = copy.deepcopy(whole.state_dict())
    assert state["0.weight"].dtype == torch.promote_types(dtype, torch.float32)
    again = WeightAverage(frozen_copy(network(dtype)), student, STEPS)
    again.load_state_dict(state)
    walk(student, 3)
    for each in (whole, again):
        each.update(3)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
        assert torch.equal(again.model.state_dict()[name], value.to(whole.model.state_dict()[name].dtype))


def test_the_term_is_the_mean_squared_distance_of_task_features():
    """Three micro-batches with anchors among them, in half precision, computed in float32."""
    generator = torch.Generator().manual_seed(0)

    def features(count: int) -> torch.Tensor:
        return normalize(torch.randn(count, 8, generator=generator), dim=-1).half()

    step = OptimizerStep(3)
    expected, images, texts = 0.0, [], []
    for number in range(3):
        x, pairs, t, anchors = features(2), features(1), features(2), features(3)
        teacher = {IMAGE: features(2), TEXT: features(2)}
        layout = {"image": x, "pair_image": pairs, "text": t, "caption_text": t, "pair_text": pairs}
        step.note(number, {**layout, **teacher})
        images += [x, pairs]
        texts += [t, anchors]
        for one, other in ((x, teacher[IMAGE]), (t, teacher[TEXT])):
            expected += (one.double() - other.double()).square().sum() / 6
    loss = TeacherLoss(Constant(), step, 5.0)
    outputs = {"image_features": torch.cat(images), "text_features": torch.cat(texts)}
    found = loss(**outputs, logit_scale=torch.ones(()), output_dict=True)
    assert found["teacher_loss"].dtype == torch.float32 and found["contrastive_loss"] == 2
    torch.testing.assert_close(found["teacher_loss"].double(), 5 * expected, rtol=1e-5, atol=0)
    assert loss(**outputs, logit_scale=torch.ones(())) == 2 + found["teacher_loss"]


class Constant(torch.nn.Module):
    """A base loss of two."""

    def forward(self, output_dict: bool = False, **outputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"contrastive_loss": torch.tensor(2.0)}


def test_steps_without_the_teacher_are_those_of_the_base_loss():
    step = OptimizerStep()
    step.note(0, {"image": torch.zeros(4, 3), "text": torch.zeros(4, 3)})
    outputs = {name: normalize(torch.randn(4, 8), dim=-1) for name in ("image_features", "text_features")}
    outputs["logit_scale"] = torch.tensor(10.0)
    found = TeacherLoss(ClipLoss(), step, 5.0)(**outputs, output_dict=True)
    assert found == {**ClipLoss()(**outputs, output_dict=True), "teacher_loss": 0}


TASK = ("--train-data", "x.tar")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arf-teacher-every", 2], "--arf-teacher-every given without --arf-teacher"),
        (["--arf-save-average"], "--arf-save-average given without --arf-teacher"),
        (["--arf-teacher", "start", "--arf-save-average"], "the teacher is the start"),
        (["--arf-teacher", "start", "--arf-teacher-weight", 0], "leaves nothing"),
        (["--arf-teacher", "start", "--resume", "latest"], "Name its weights with --pretrained"),
        (["--arf-teacher", "start", "--torchscript"], "cannot be copied"),
        (["--arf-teacher", "start", "--arf-head", "h", "--arf-classnames", "n"], "there are no texts"),
        (["--arf-teacher", "average", "--arf-deterministic", "--logs", "none"], "there is no folder"),
    ],
)
def test_what_cannot_go_together_is_refused(parse, flags, message):
    with pytest.raises(FlagError, match=message):
        parse(*TASK, *flags)


def test_runs_that_are_to_be_resumed_save_their_average(parse):
    assert not parse(*TASK, "--arf-teacher", "average").save_average
    assert parse(*TASK, "--arf-teacher", "average", "--arf-checkpoint-every", 5).save_average
    assert not parse(*TASK, "--arf-teacher", "start", "--arf-deterministic").save_average
    resumed = parse(*TASK, "--arf-teacher", "start", "--resume", "latest", "--pretrained", "p")
    assert resumed.teacher == "start" and resumed.teacher_weight == 10
