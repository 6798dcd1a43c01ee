"""Row losses for the CPU in C++, compiled on the user's machine."""
