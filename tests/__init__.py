"""The tests of Fleet."""

# ends a test that hangs; whatever passes has the time that it takes, on a slow or busy machine too
HANG_S = 900
