"""Operations with hand-derived gradients."""
