"""Methods that choose visual tokens: pure functions from what is seen of a medium and a count to what stays."""
