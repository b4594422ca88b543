import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from natrain.data.digits import read_digits


def pixels(images):
    return np.stack([np.asarray(images.load(index, "L")) for index in range(len(images.targets))])


def test_the_split_is_fixed_stratified_and_complete():
    splits, again = read_digits(), read_digits()
    train, test = pixels(splits.train), pixels(splits.val)
    assert (len(train), len(test)) == (1437, 360)
    assert np.array_equal(test, pixels(again.val))
    share = np.bincount(load_digits().target) * 360 / 1797
    assert np.abs(np.bincount(splits.val.targets) - share).max() < 1

    def rows(images, targets):
        levels = images.reshape(len(images), 64).astype(int)
        return sorted((*row, target) for row, target in zip(levels.tolist(), targets.tolist(), strict=True))

    bundle = load_digits()
    images = np.concatenate([train, test]) / 255 * 16
    targets = np.concatenate([splits.train.targets, splits.val.targets])
    assert rows(images.round(), targets) == rows(bundle.images, bundle.target)


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'natrain\[digits\]'"):
        read_digits()


def test_a_root_that_would_be_ignored_is_an_error():
    with pytest.raises(ValueError, match="data.root='somewhere'.*data.root=null"):
        read_digits("somewhere")
