package archive

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/layerfs/layerfs"
)

// ContentCheck says when [Compare] reads files.
type ContentCheck uint8

// The content checks. A file whose size differs is never read, nor are two
// names of one inode.
const (
	// ContentExact reads both files unless it is certain that they are equal.
	// A later modification time of one of them makes it Modified in any case,
	// so that only pairs with equal times and sizes are read, and of these not
	// those that CompareOptions.Since covers.
	ContentExact ContentCheck = iota
	// ContentTrustTimes takes files of equal size and modification time for
	// equal, as Docker does. It is wrong for a file that was changed and then
	// had its time set back.
	ContentTrustTimes
)

// CompareOptions are the options of [Compare].
type CompareOptions struct {
	Content ContentCheck

	// Since is when the new tree was an exact copy of the old one, which has
	// not changed after that. What has an earlier change time in the new tree
	// cannot have been changed since, as the kernel sets that time at each
	// change and no call can set it back: it is neither looked at in the old
	// tree nor read, and for a directory that means the list of its names. Zero means that nothing of this kind is known.
	//
	// It needs a clock that was not set back in between, and on Linux one that
	// file systems use: CLOCK_REALTIME_COARSE. time.Now may be ahead of that by
	// a timer tick, which is allowed for, and in a busy virtual machine by more.
	Since time.Time

	// IgnoreXattr reports whether an xattr does not count; nil means all do.
	// It is called by several goroutines.
	IgnoreXattr func(name string) bool

	// Workers is the number of goroutines; 0 means one for each processor, at
	// most 8.
	Workers int

	Progress layerfs.ProgressFunc

	portable bool // tests: the implementation of other systems
	noAt     bool // tests: without listxattrat
}

func (o *CompareOptions) validate() error {
	var errs []error
	if o.Content > ContentTrustTimes {
		errs = append(errs, fmt.Errorf("content check %d is unknown", o.Content))
	}
	if o.Workers < 0 {
		errs = append(errs, fmt.Errorf("%d workers", o.Workers))
	}
	return errors.Join(errs...)
}

// Compare yields what differs in the tree newDir from the tree oldDir, by the
// rules and in the order of [layerfs.Change]. Both are walked at once by
// several goroutines; changes are yielded while the walk goes on. Iteration
// stops after the first error. opts may be nil.
//
// Neither tree should change meanwhile: what is found of a change under way is
// undefined. Access times are not touched where the caller owns the files.
// Nothing outside the trees is looked at; links are not followed.
//
// The cost is one stat and one listxattr for each file of both trees, less
// with CompareOptions.Since, and reading as CompareOptions.Content says.
func Compare(ctx context.Context, oldDir, newDir string, opts *CompareOptions) iter.Seq2[layerfs.Change, error] {
	if opts == nil {
		opts = &CompareOptions{}
	}
	return func(yield func(layerfs.Change, error) bool) {
		if err := opts.validate(); err != nil {
			yield(layerfs.Change{}, err)
			return
		}
		err := compareTrees(ctx, oldDir, newDir, opts, func(c layerfs.Change) bool { return yield(c, nil) })
		if err != nil && err != errStopped {
			yield(layerfs.Change{}, err)
		}
	}
}

// errStopped says that the loop over the changes was left.
var errStopped = errors.New("stopped")

// changeTimeSlack covers that the kernel's change times are those of the last
// timer tick, at most 10 ms ago, while Since is exact.
const changeTimeSlack = 20 * time.Millisecond

// wholeSeconds is the slack for a change time without a fraction: it may be of a
// file system that keeps none.
const wholeSeconds = 2 * time.Second
