"""What every part of keepstep agrees on: words, numbers, the shape of a job. No I/O but the clock's."""
