from lpsparse.cli import main

main()
