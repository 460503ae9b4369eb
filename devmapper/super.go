package devmapper

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
)

// super is what is used of the superblock of a file system.
type super struct {
	uuid string
	fs   inodeTables // nil if its layout is one that is not understood
	why  string      // then: what is not
}

// readSuper reads the superblock of the file system on a device.
func readSuper(path, fs string) (super, error) {
	f, err := os.Open(path)
	if err != nil {
		return super{}, err
	}
	defer f.Close()
	return parseSuper(f, fs)
}

func parseSuper(r io.ReaderAt, fs string) (super, error) {
	b := make([]byte, 4096)
	if _, err := r.ReadAt(b, 0); err != nil {
		return super{}, err
	}
	switch fs {
	case "ext4":
		sb := b[1024:]
		if binary.LittleEndian.Uint16(sb[0x38:]) != 0xef53 {
			return super{}, fmt.Errorf("no ext4 file system")
		}
		s := super{uuid: formatUUID(sb[0x68:])}
		tables, err := newExt4(sb)
		if err != nil {
			s.why = err.Error()
			return s, nil
		}
		s.fs = tables
		return s, nil
	case "xfs":
		if string(b[:4]) != "XFSB" {
			return super{}, fmt.Errorf("no xfs file system")
		}
		s := super{uuid: formatUUID(b[32:])}
		tables, err := newXFS(b)
		if err != nil {
			s.why = err.Error()
			return s, nil
		}
		s.fs = tables
		return s, nil
	}
	return super{}, fmt.Errorf("file system %s is not known", fs)
}

func formatUUID(b []byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:16])
}
