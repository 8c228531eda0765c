"""What tests share; never imported by the product."""
