"""The explorers: every control changes the picture, and nothing that a control can be set to stops one."""
import ipywidgets as widgets
import pytest

from sd_deepdive import explore
from sd_deepdive.parts import load_parts

EXPLORERS = [explore.explore_guidance, explore.explore_strength, explore.explore_film, explore.explore_mixing, explore.explore_schedulers]


@pytest.fixture(scope='module')
def parts(): return load_parts(device='cpu')


@pytest.mark.parametrize('make', EXPLORERS, ids=lambda f: f.__name__)
def test_each_control(make, parts):
    "Turn one knob after another and look whether there is another picture."
    *controls, message, shown = make(parts).children
    words = iter(['banana, 3d style', 'red apple'])
    for c in controls:
        before = bytes(shown.value)
        if isinstance(c, widgets.Text): c.value = next(words)
        elif isinstance(c, widgets.Dropdown): c.value = next(o for o in c.options if o != c.value)
        else: c.value = c.value + c.step*(1 if c.value + c.step <= c.max else -1)
        assert bytes(shown.value) != before and message.value == '', c.description


@pytest.mark.parametrize('make', EXPLORERS, ids=lambda f: f.__name__)
def test_extremes(make, parts):
    "The ends of every slider, an empty prompt and one that is too long draw something; a remark is shown, not raised."
    *controls, message, shown = make(parts).children
    for c in controls:
        usual = c.value
        if isinstance(c, widgets.Text): values = ['', 'red '*100]
        elif isinstance(c, widgets.Dropdown): continue
        else: values = [c.min, min(c.max, 5)]
        for value in values:
            c.value = value
            assert shown.value and ('cut off' in message.value) == (value == 'red '*100)
        c.value = usual


def test_no_pipeline():
    with pytest.raises(TypeError, match='load_pipeline'): explore.explore_guidance('embedded')
