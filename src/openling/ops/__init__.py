"""Operations. Each is a plain PyTorch definition (the twin); fast versions must match it."""
