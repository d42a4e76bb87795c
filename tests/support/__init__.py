"""What the tests share: comparing with the reference, recording and compiling launches."""
