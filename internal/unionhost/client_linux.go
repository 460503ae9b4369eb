package unionhost

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/fusesrv"
	"github.com/layerfs/layerfs/internal/keeper"
	"github.com/layerfs/layerfs/internal/mount"
)

// A Client calls the helper of a directory, and starts it when it is needed.
// Its methods are safe for concurrent use.
type Client struct {
	Dir     string   // absolute; made if missing
	Command []string // of a program that calls keeper.Main

	used  atomic.Bool
	ahead int // what is added to Version, in tests
}

// A call is made again if the worker dies meanwhile, up to tries times, with
// pauses: what killed it may kill the next one, too.
const (
	tries      = 10
	firstPause = time.Millisecond
)

// retried calls f until it does not end because the worker did.
func retried(ctx context.Context, f func() error) error {
	for n := 0; ; n++ {
		err := f()
		dead := errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
		if !dead || n == tries {
			return err
		}
		t := time.NewTimer(firstPause << n)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return context.Cause(ctx)
		}
	}
}

// ask makes one call on a connection.
func (cl *Client) ask(ctx context.Context, c *keeper.Conn, req *request, fds ...int) (ans answer, err error) {
	req.Version = Version + cl.ahead
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if err = c.Send(req, fds...); err == nil {
		var got []int
		got, err = c.Recv(&ans)
		keeper.CloseAll(got)
	}
	if cause := context.Cause(ctx); cause != nil && err != nil {
		return ans, cause
	}
	if err == nil && ans.Error != nil {
		err = ans.Error
	}
	return ans, err
}

// Mount mounts a union. The error is ErrClosed or an errno of the worker's; a
// mount that failed leaves nothing behind.
func (c *Client) Mount(ctx context.Context, cfg Config) (rep []Repaired, err error) {
	err = c.understood(ctx, func() error {
		return retried(ctx, func() (err error) {
			rep, err = c.mount(ctx, cfg)
			return err
		})
	})
	return rep, err
}

// understood makes a call, again after the worker was replaced if that does not
// know calls of this version.
func (c *Client) understood(ctx context.Context, call func() error) error {
	err := call()
	if !errors.Is(err, errnoLater) || len(c.Command) == 0 {
		return err
	}
	if rerr := c.Replace(ctx); rerr != nil {
		return errors.Join(err, rerr)
	}
	return call()
}

func (c *Client) mount(ctx context.Context, cfg Config) (_ []Repaired, err error) {
	req := &request{Op: opMount, Config: &cfg}
	for _, b := range cfg.Branches {
		is, err := placeOf(b.Path)
		if err != nil {
			return nil, err
		}
		req.Are = append(req.Are, is)
	}
	c.used.Store(true)
	conn, err := keeper.Dial(ctx, c.Dir, c.Command)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	fd, err := fusesrv.OpenDevice()
	if err != nil {
		return nil, err
	}
	ans, err := func() (answer, error) {
		defer unix.Close(fd) // the worker has it from here on
		ans, err := c.ask(ctx, conn, req, fd)
		if err != nil {
			return ans, err
		}
		return ans, fusesrv.MountDevice(fd, cfg.mountConfig())
	}()
	if err != nil {
		return nil, err
	}
	number, err := connection(cfg.Target)
	if err == nil {
		_, err = c.ask(ctx, conn, &request{Op: opMounted, Conn: number})
	}
	if err != nil {
		return nil, errors.Join(err, mount.IgnoreNotMounted(mount.Unmount(cfg.Target)))
	}
	return ans.Repaired, nil
}

// placeOf returns which directory a branch is, without asking a server.
func placeOf(path string) (place, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st); err != nil {
		return place{}, &os.PathError{Op: "statx", Path: path, Err: err}
	}
	return place{unix.Mkdev(st.Dev_major, st.Dev_minor), st.Ino}, nil
}

// connection returns the number of the FUSE connection of a mount, without
// asking its server, which may wait for this.
func connection(target string) (int, error) {
	infos, err := mount.Under(target)
	if err != nil {
		return 0, err
	}
	for k := len(infos) - 1; k >= 0; k-- {
		if infos[k].FSType == "fuse.layerfs" && infos[k].Major == 0 {
			return infos[k].Minor, nil
		}
	}
	return 0, fmt.Errorf("%s: %w", target, mount.ErrNotMounted)
}

// call makes a call about a mount. ErrNotServed says that no helper serves it.
func (c *Client) call(ctx context.Context, req *request) (ans answer, err error) {
	err = retried(ctx, func() error {
		conn, err := keeper.Dial(ctx, c.Dir, nil)
		if errors.Is(err, keeper.ErrNone) {
			return ErrNotServed
		}
		if err != nil {
			return err
		}
		defer conn.Close()
		ans, err = c.ask(ctx, conn, req)
		req.Retry = true
		return err
	})
	if errors.Is(err, errnoNotServed) {
		err = ErrNotServed
	}
	return ans, err
}

// Insert puts a branch into the union on target, at an index; -1: at the end.
func (c *Client) Insert(ctx context.Context, target string, at int, b Branch) error {
	req := &request{Op: opInsert, Target: []byte(target), At: at, Branch: b}
	if at < 0 {
		req.Op = opAppend
	}
	var err error
	if req.Is, err = placeOf(b.Path); err != nil {
		return err
	}
	return c.understood(ctx, func() error {
		r := *req
		_, err := c.call(ctx, &r)
		return err
	})
}

// Modify changes the permission of a branch.
func (c *Client) Modify(ctx context.Context, target string, b Branch) error {
	_, err := c.call(ctx, &request{Op: opModify, Target: []byte(target), Branch: b})
	return err
}

// Delete takes a branch away.
func (c *Client) Delete(ctx context.Context, target, path string) error {
	_, err := c.call(ctx, &request{Op: opDelete, Target: []byte(target), Branch: Branch{Path: path}})
	return err
}

// Branches returns the branches of a union.
func (c *Client) Branches(ctx context.Context, target string) ([]Branch, error) {
	ans, err := c.call(ctx, &request{Op: opBranches, Target: []byte(target)})
	return ans.Branches, err
}

// Flush makes pseudo-links real.
func (c *Client) Flush(ctx context.Context, target string) error {
	_, err := c.call(ctx, &request{Op: opFlush, Target: []byte(target)})
	return err
}

// Sync returns when direct changes of branches show.
func (c *Client) Sync(ctx context.Context, target string) error {
	_, err := c.call(ctx, &request{Op: opSync, Target: []byte(target)})
	return err
}

// Info tells of the helper.
func (c *Client) Info(ctx context.Context) (Info, error) {
	ans, err := c.call(ctx, &request{Op: opInfo})
	if err == nil && ans.Info == nil {
		err = errors.New("[bug] no info")
	}
	if err != nil {
		return Info{}, err
	}
	return *ans.Info, nil
}

// Replace makes the helper go on with the program of this client. The error
// matches os.ErrNotExist if that is this one, and its file is gone.
func (c *Client) Replace(ctx context.Context) error {
	argv, err := keeper.Named(c.Command)
	if err != nil {
		return err
	}
	_, err = c.call(ctx, &request{Op: opReplace, Argv: argv})
	return err
}

// Wait returns when what was mounted on a target, and is not any more, has let
// its branches go, or is known to be still in use.
func (c *Client) Wait(ctx context.Context, target string) error {
	_, err := c.call(ctx, &request{Op: opWait, Target: []byte(target)})
	if errors.Is(err, ErrNotServed) {
		return nil
	}
	return err
}

// Close ends a helper that this client used and that has no mounts, so that
// nothing keeps the directory busy.
func (c *Client) Close() error {
	if !c.used.Load() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), restFor)
	defer cancel()
	ans, err := c.call(ctx, &request{Op: opRest})
	if err != nil && !errors.Is(err, ErrNotServed) {
		return err
	}
	if ans.Info != nil && len(ans.Info.Mounts) > 0 {
		return nil
	}
	return keeper.Gone(ctx, c.Dir)
}

// restFor is far more than a helper without mounts needs to end.
const restFor = 2 * time.Second
