"""Experiments: training, comparing and showing, with the library's own decays."""
