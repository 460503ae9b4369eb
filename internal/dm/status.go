package dm

import (
	"fmt"
	"strconv"
	"strings"
)

// PoolMode says what a thin pool allows.
type PoolMode string

// The modes of a pool, from best to worst.
const (
	PoolReadWrite  PoolMode = "rw"
	PoolOutOfSpace PoolMode = "out_of_data_space" // writes wait or fail until the data device grows
	PoolReadOnly   PoolMode = "ro"                // the metadata cannot be changed
	PoolError      PoolMode = "Error"             // the kernel could not read the status
	PoolFail       PoolMode = "Fail"              // all I/O fails
)

// PoolStatus is the status of a thin pool. Only Mode is set if it is
// [PoolError] or [PoolFail].
type PoolStatus struct {
	Mode            PoolMode
	TransactionID   uint64
	UsedMeta        uint64 // blocks of 4 KiB
	TotalMeta       uint64
	UsedData        uint64 // blocks of the pool
	TotalData       uint64
	HeldRoot        uint64 // block of the metadata snapshot, 0 if there is none
	IgnoreDiscard   bool
	DiscardPassdown bool
	ErrorIfNoSpace  bool
	NeedsCheck      bool   // thin_check or thin_repair must run before it is writable
	MetaLowWater    uint64 // free metadata blocks at which an event is sent; Linux 4.19
}

// MetadataBlockSize is the size of a block of a pool's metadata, in bytes.
const MetadataBlockSize = 4096

// ParsePoolStatus reads the status line of a thin pool. Fields that older
// kernels lack stay zero.
func ParsePoolStatus(s string) (PoolStatus, error) {
	bad := func(why string) (PoolStatus, error) {
		return PoolStatus{}, fmt.Errorf("status of thin-pool %q: %s", s, why)
	}
	f := strings.Fields(s)
	if len(f) == 1 && (f[0] == string(PoolFail) || f[0] == string(PoolError)) {
		return PoolStatus{Mode: PoolMode(f[0])}, nil
	}
	if len(f) < 5 {
		return bad("too short")
	}
	var st PoolStatus
	var err error
	if st.TransactionID, err = strconv.ParseUint(f[0], 10, 64); err != nil {
		return bad("transaction id")
	}
	var ok bool
	if st.UsedMeta, st.TotalMeta, ok = fraction(f[1]); !ok {
		return bad("metadata blocks")
	}
	if st.UsedData, st.TotalData, ok = fraction(f[2]); !ok {
		return bad("data blocks")
	}
	if f[3] != "-" {
		if st.HeldRoot, err = strconv.ParseUint(f[3], 10, 64); err != nil {
			return bad("held root")
		}
	}
	switch m := PoolMode(f[4]); m {
	case PoolReadWrite, PoolReadOnly, PoolOutOfSpace:
		st.Mode = m
	default:
		return bad("mode")
	}
	for i, w := range f[5:] {
		switch w {
		case "ignore_discard":
			st.IgnoreDiscard = true
		case "discard_passdown":
			st.DiscardPassdown = true
		case "error_if_no_space":
			st.ErrorIfNoSpace = true
		case "needs_check":
			st.NeedsCheck = true
		case "no_discard_passdown", "queue_if_no_space", "-":
		default:
			if st.MetaLowWater, err = strconv.ParseUint(w, 10, 64); err != nil || i != len(f)-6 {
				return bad("unknown word " + w)
			}
		}
	}
	return st, nil
}

// fraction reads "used/total".
func fraction(s string) (used, total uint64, ok bool) {
	a, b, ok := strings.Cut(s, "/")
	used, err1 := strconv.ParseUint(a, 10, 64)
	total, err2 := strconv.ParseUint(b, 10, 64)
	return used, total, ok && err1 == nil && err2 == nil && used <= total
}

// ThinStatus is the status of a thin device.
type ThinStatus struct {
	Failed  string // "Fail" or "Error" if the pool has failed, then nothing else is known
	Mapped  uint64 // sectors that are mapped, shared or not
	Highest uint64 // highest mapped sector; 0 if Mapped is 0
}

// ParseThinStatus reads the status line of a thin device.
func ParseThinStatus(s string) (ThinStatus, error) {
	bad := fmt.Errorf("status of thin %q: not understood", s)
	f := strings.Fields(s)
	switch {
	case len(f) == 1 && (f[0] == "Fail" || f[0] == "Error"):
		return ThinStatus{Failed: f[0]}, nil
	case len(f) == 1 && f[0] == "-": // no device behind it, suspended before the first resume
		return ThinStatus{}, nil
	case len(f) != 2:
		return ThinStatus{}, bad
	}
	var st ThinStatus
	var err error
	if st.Mapped, err = strconv.ParseUint(f[0], 10, 64); err != nil {
		return ThinStatus{}, bad
	}
	if f[1] == "-" {
		if st.Mapped != 0 {
			return ThinStatus{}, bad
		}
		return st, nil
	}
	if st.Highest, err = strconv.ParseUint(f[1], 10, 64); err != nil {
		return ThinStatus{}, bad
	}
	return st, nil
}
