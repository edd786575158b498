import pytest

from micronet.errors import count


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(1, "image", "1 image"), (0, "layer", "0 layers"), (2, "class", "2 classes"), (1024, "entry", "1,024 entries")],
)
def test_numbers_agree_with_their_nouns(number, noun, text):
    assert count(number, noun) == text
