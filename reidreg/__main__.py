from reidreg.cli import main

raise SystemExit(main())
