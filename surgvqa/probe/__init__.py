"""Tests whether a model follows the spoken question and looks at the frames, with altered samples."""
