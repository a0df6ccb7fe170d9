"""The function explain takes the batch of a step by place, or as a dict by keyword, and refuses anything else."""

import pytest

import smet_compile as smet
from tests.support.states import Unchanged
from tests.train_step.setting import active, batch_of, sparse


def test_a_batch_by_keyword_is_the_dict_of_it() -> None:
    model = sparse()
    optimizer = active(model)
    step = smet.compile_train_step(model, optimizer)
    batch = batch_of(0)
    with Unchanged(model, optimizer):
        by_place, by_keyword = smet.explain(step, batch), smet.explain(step, **batch)
        assert by_place == by_keyword and by_place.updates_fused
        assert smet.explain(step, strict=True, **batch) == by_place
        for example, inputs in (((), {}), ((batch,), batch), ((batch, batch), {})):
            with pytest.raises(ValueError, match=r"explain: expected one batch as the step takes it, got \d by place"):
                smet.explain(step, *example, **inputs)
        with pytest.raises(ValueError, match="strict: expected True or False"):
            smet.explain(step, batch, strict=1)  # type: ignore[arg-type]
