"""The op on a CPU in C++, compiled where it runs."""
