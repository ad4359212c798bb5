"""The explorers: every control changes the picture, and nothing that a control can be set to stops one."""
import ipywidgets as widgets
import pytest

from sd_deepdive import explore
from sd_deepdive.further.inside import unet_by_hand
from sd_deepdive.parts import load_parts

EXPLORERS = [explore.explore_guidance, explore.explore_strength, explore.explore_film, explore.explore_mixing, explore.explore_schedulers,
             explore.explore_attention]


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
    "The ends of every slider, an empty prompt, one that is too long and one that the model does not know draw something; a remark is shown, not raised."
    *controls, message, shown = make(parts).children
    for c in controls:
        usual = c.value
        if isinstance(c, widgets.Text): values = ['', 'red '*100, 'a submarine']
        elif isinstance(c, widgets.Dropdown): continue
        else: values = [c.min, min(c.max, 5)]
        for value in values:
            c.value = value
            assert shown.value and ('cut off' in message.value) == (value == 'red '*100)
            assert ('never learned these words: submarine.' in message.value) == (value == 'a submarine')
        c.value = usual


def test_film(parts):
    "Another step decodes no more than its two pictures and asks the UNet nothing; a remark on the prompt stays while the steps go by."
    prompt, seed, step, message, shown = explore.explore_film(parts).children
    asked, decoded = [], []
    hooks = [parts.unet.register_forward_hook(lambda *_: asked.append(1)),
             parts.vae.decoder.register_forward_hook(lambda module, args, out: decoded.append(len(out)))]
    try:
        prompt.value = 'red '*100
        assert asked and decoded == [2] and message.value.count('cut off') == 1
        asked.clear()
        for value in (3, 0, 19): step.value = value; assert 'cut off' in message.value, value
        assert not asked and decoded == [2]*4
        prompt.value = 'red apple'
        assert message.value == ''
    finally:
        for hook in hooks: hook.remove()


def test_attention(parts):
    "Another step asks the UNet nothing; another prompt has other tokens to choose from."
    ours, asked = unet_by_hand(parts), []
    prompt, token, step, seed, message, shown = explore.explore_attention(ours).children
    before = bytes(shown.value)
    with ours.unet.register_forward_pre_hook(lambda *_: asked.append(1)): step.value = 0
    assert bytes(shown.value) != before and not asked
    assert token.options[1] == '1 octopus' and token.value.endswith('background')
    prompt.value = 'red apple'
    assert token.options == ('0 start', '1 red', '2 apple', '3 end') and message.value == ''


def test_no_pipeline():
    with pytest.raises(TypeError, match='load_pipeline'): explore.explore_guidance('embedded')


def test_no_control():
    "A number in place of a control is told by its name."
    with pytest.raises(TypeError, match='x=3 is no control'): explore.explorer(lambda x: None, x=3)
