"""Grain on generated pictures: the same for everybody, as strong as was asked for, on other pictures of their own."""

import numpy as np
import pytest

from eval.data.load import make_tasks
from eval.grain import grained
from eval.tasks import generated_task
from expertflow_quant.samples import make_items


def test_grain_has_its_deviation_and_is_the_same_every_time():
    item = make_items("chart", "test", 1)[0]
    clean = np.asarray(item.image, dtype=float)
    one, other = grained(item, 20.0), grained(item, 20.0)
    assert one.image.tobytes() == other.image.tobytes()
    assert one.image_key == other.image_key != item.image_key
    noise = np.asarray(one.image, dtype=float) - clean
    middle = (clean > 80) & (clean < 175)  # where nothing is cut off
    assert middle.sum() > 200
    assert noise[middle].std() == pytest.approx(20, rel=0.15)
    assert abs(noise[middle].mean()) < 3
    assert grained(item, 0.0) is item


def test_questions_of_one_picture_share_its_grain():
    items = make_items("document", "test", 12)
    keys = {}
    for item in items:
        keys.setdefault(item.image_key, set()).add(grained(item, 50.0).image_key)
    assert len(keys) < len(items)
    assert all(len(found) == 1 for found in keys.values())
    assert len({key for found in keys.values() for key in found}) == len(keys)


def test_a_grained_task_is_another_task():
    clean, rough = (generated_task("chart", 4, grain=grain) for grain in (0.0, 110.0))
    assert clean.fingerprint != rough.fingerprint
    assert rough.source.endswith("grain 110")
    assert clean.fingerprint == generated_task("chart", 4).fingerprint
    (made,) = make_tasks(["chart"], {}, limit=4, grain=110.0)
    assert made.fingerprint == rough.fingerprint
    with pytest.raises(ValueError, match=r"grain -1\.0 is no deviation"):
        generated_task("chart", 2, grain=-1.0)
