"""The tests here import the collection."""

from tests.collection import make_importable

make_importable()
