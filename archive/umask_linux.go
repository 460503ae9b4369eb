package archive

import (
	"errors"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// readUmask returns the file mode creation mask of the process. umask(2) can
// only tell it by changing it, for all threads; proc(5) has it since Linux
// 4.7. Where proc does not tell, every mode is set explicitly.
func readUmask() (uint32, error) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0o777, nil
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		if v, ok := strings.CutPrefix(line, "Umask:"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(v), 8, 32)
			if err != nil {
				return 0, err
			}
			return uint32(n), nil
		}
	}
	return 0o777, nil
}

func isErrno(err error, errnos ...unix.Errno) bool {
	var e unix.Errno
	return errors.As(err, &e) && slices.Contains(errnos, e)
}
