"""Cut the target before step 0, then train what is left."""

from lpsparse.training.methods import Method


class OneShot(Method):
    cuts = "start"
