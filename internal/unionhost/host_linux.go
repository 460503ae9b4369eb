package unionhost

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/fusesrv"
	"github.com/layerfs/layerfs/internal/keeper"
	"github.com/layerfs/layerfs/internal/unionfs"
	"github.com/layerfs/layerfs/internal/watch"
)

// idleFor is how long a worker without mounts waits for the next call.
const idleFor = 3 * time.Second

// host is the worker.
type host struct {
	w   *keeper.Worker
	log *slog.Logger

	mu      sync.Mutex
	hub     *watch.Hub        // guarded by mu; made when first needed
	unions  map[string]*union // guarded by mu; by number
	last    uint64            // guarded by mu; number of the last union
	calls   int               // guarded by mu; that run
	idle    *time.Timer       // guarded by mu
	ending  bool              // guarded by mu; takes no more calls
	leaving bool              // guarded by mu; the same, since another worker is to do so
	tired   bool              // guarded by mu; ends as soon as there is nothing to do
}

// A union that is served.
type union struct {
	h     *host
	name  string // number
	cfg   Config
	conn  int
	fs    *unionfs.FS
	srv   atomic.Pointer[fusesrv.Server]
	st    *fusesrv.State
	dev   int // number of the device's descriptor
	watch *fusesrv.Watch
	done  chan struct{}

	mu sync.Mutex // one change of the branches at a time, and their end

	keeping sync.Mutex // held while all is given to a keeper
	ended   bool       // there is nothing more to keep; guarded by keeping

	locks []int // of writable branches, for store; changed in State.Hand
}

// Program is the helper, for keeper.Main.
func Program() keeper.Program { return keeper.Program{Work: work, Version: Version} }

// work is the worker.
func work(w *keeper.Worker) error {
	h := &host{
		w: w, unions: map[string]*union{},
		log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	if err := h.resume(w.Kept()); err != nil {
		return err
	}
	if err := w.Ready(keeper.Duties{Hand: h.hand, Alive: h.alive}); err != nil {
		return err
	}
	h.mu.Lock()
	h.idle = time.AfterFunc(idleFor, h.maybeEnd)
	h.mu.Unlock()
	for {
		c, err := w.Accept()
		if err != nil {
			h.mu.Lock()
			defer h.mu.Unlock()
			if h.ending {
				return nil
			}
			return err
		}
		h.mu.Lock()
		if h.ending || h.leaving {
			h.mu.Unlock()
			c.Close() // the caller tries again, with another worker
			continue
		}
		h.calls++
		h.mu.Unlock()
		go func() {
			h.call(c)
			c.Close()
			h.mu.Lock()
			h.calls--
			h.rest()
			h.mu.Unlock()
		}()
	}
}

// hand gives a new keeper what another worker needs.
func (h *host) hand() error {
	var errs []error
	for _, u := range h.all() {
		errs = append(errs, u.hand())
	}
	return errors.Join(errs...)
}

// alive reports whether the requests of all unions are taken.
func (h *host) alive() bool {
	for _, u := range h.all() {
		if s := u.srv.Load(); s != nil && !s.Alive() {
			h.log.Error("requests wait, and none is taken", "target", u.cfg.Target)
			return false
		}
	}
	return true
}

func (h *host) all() (list []*union) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, u := range h.unions {
		list = append(list, u)
	}
	return list
}

// rest starts to wait for the end, if there is nothing to do. mu is held.
func (h *host) rest() {
	if h.calls > 0 || len(h.unions) > 0 || h.idle == nil {
		return
	}
	if h.tired {
		h.ending = true
		h.w.Close()
		return
	}
	h.idle.Reset(idleFor)
}

func (h *host) maybeEnd() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.calls > 0 || len(h.unions) > 0 || h.ending {
		return
	}
	h.ending = true
	h.w.Close()
}

// call answers the requests of a connection, of which a mount has two.
func (h *host) call(c *keeper.Conn) {
	var pending *union
	for {
		var req request
		fds, err := c.Recv(&req)
		if err != nil {
			if pending != nil {
				pending.giveUp()
			}
			return
		}
		var ans answer
		switch req.Op {
		case opMount:
			if pending != nil || len(fds) != 1 || req.Config == nil {
				err = errors.New("[bug] a mount needs a device and a configuration, once")
				break
			}
			if err = later(&req); err != nil {
				break
			}
			pending, ans.Repaired, err = h.open(*req.Config, fds[0], req.Are)
			fds = nil
		case opMounted:
			if pending == nil {
				err = errors.New("[bug] nothing to be mounted")
				break
			}
			u := pending
			pending = nil
			err = u.serve(req.Conn)
		default:
			ans, err = h.do(&req)
		}
		keeper.CloseAll(fds)
		ans.Error = remote(err)
		leave := req.Op == opReplace && err == nil
		if leave {
			h.leave(true) // so that who gets the answer calls the next one
		}
		lost := c.Send(ans) != nil
		if leave {
			h.makeRoom()
		}
		if lost {
			if pending != nil {
				pending.giveUp()
			}
			return
		}
	}
}

// later refuses a call that means more than this program knows.
func later(req *request) error {
	if req.Version > Version {
		return fmt.Errorf("the helper knows calls of version %d, and this one has %d: %w", Version, req.Version, errnoLater)
	}
	return nil
}

// do answers all but mounts.
func (h *host) do(req *request) (ans answer, err error) {
	ctx := context.Background()
	switch req.Op {
	case opInfo, opRest:
		ans.Info = &Info{PID: os.Getpid(), Keeper: h.w.Keeper()}
		h.mu.Lock()
		for _, u := range h.unions {
			ans.Info.Mounts = append(ans.Info.Mounts, u.cfg.Target)
		}
		h.tired = h.tired || req.Op == opRest && len(h.unions) == 0
		h.mu.Unlock()
		return ans, nil
	case opWait:
		h.wait(string(req.Target))
		return ans, nil
	case opReplace:
		return ans, h.next(req.Argv)
	}
	u := h.find(string(req.Target))
	if u == nil {
		return ans, errnoNotServed
	}
	switch req.Op {
	case opBranches:
		for _, b := range u.fs.Branches() {
			ans.Branches = append(ans.Branches, Branch{b.Path, b.Perm.String()})
		}
	case opFlush:
		err = u.fs.FlushLinks()
	case opSync:
		err = u.srv.Load().Sync(ctx)
	case opInsert, opAppend, opModify, opDelete:
		if err = later(req); err == nil {
			err = u.alter(req)
		}
	default:
		err = fmt.Errorf("call %q: %w", req.Op, unix.ENOSYS)
	}
	return ans, err
}

// find returns the union that was mounted last on a target.
func (h *host) find(target string) (found *union) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, u := range h.unions {
		if u.cfg.Target == target && u.srv.Load() != nil && (found == nil || number(u.name) > number(found.name)) {
			found = u
		}
	}
	return found
}

func number(name string) uint64 {
	n, _ := strconv.ParseUint(name, 10, 64)
	return n
}

// wait returns when what was mounted on a target is gone, unless it is still
// in use somewhere.
func (h *host) wait(target string) {
	patience := time.NewTimer(waitFor)
	defer patience.Stop()
	h.mu.Lock()
	var ends []chan struct{}
	for _, u := range h.unions {
		if u.cfg.Target == target {
			ends = append(ends, u.done)
		}
	}
	h.mu.Unlock()
	for _, c := range ends {
		select {
		case <-c:
		case <-patience.C:
			return
		}
	}
}

const waitFor = 2 * time.Second

// next makes the keeper run a program after this worker, if it can go on with
// what is mounted. Without a keeper this worker goes on, since with it all mounts
// would end.
func (h *host) next(argv []string) error {
	if len(argv) > 0 {
		v, err := keeper.Version(context.Background(), argv, h.w.Dir())
		if err != nil {
			return err
		}
		if v < Version {
			return fmt.Errorf("%s is an earlier program, of version %d: what is mounted has version %d and can only be unmounted before", argv[0], v, Version)
		}
	}
	return h.w.Next(argv)
}

// makeRoom ends this worker, so that the keeper starts another. What is being
// served is served again.
func (h *host) makeRoom() {
	if h.w.Followed() {
		os.Exit(keeper.ExitNext)
	}
	h.log.Warn("replace", "err", keeper.ErrNoKeeper) // since just now
	h.leave(false)
}

func (h *host) leave(leaving bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.leaving = leaving
}

// open opens the branches of a union that is to be mounted.
func (h *host) open(cfg Config, dev int, are []place) (_ *union, _ []Repaired, err error) {
	u := &union{h: h, cfg: cfg, dev: dev, done: make(chan struct{})}
	defer func() {
		if err != nil {
			unix.Close(dev)
		}
	}()
	if len(are) != len(cfg.Branches) {
		return nil, nil, fmt.Errorf("[bug] %d places of %d branches", len(are), len(cfg.Branches))
	}
	for k, is := range are {
		if err := h.permitted(cfg.Branches[k].Path, is); err != nil {
			return nil, nil, err
		}
	}
	h.mu.Lock()
	h.last++
	h.tired = false
	u.name = strconv.FormatUint(h.last, 10)
	h.unions[u.name] = u
	h.mu.Unlock()
	rep, w, err := u.openEngine(nil)
	if err == nil {
		if u.st, err = fusesrv.NewState(); err == nil {
			err = u.setMeta()
		}
	}
	if err != nil {
		u.release(w)
		return nil, nil, err
	}
	return u, rep, nil
}

// foreign refuses a branch that lies on a mount served here.
func (h *host) foreign(dev uint64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, u := range h.unions {
		if u.conn != 0 && unix.Major(dev) == 0 && int(unix.Minor(dev)) == u.conn {
			return fmt.Errorf("a branch on %s, which the same helper serves: %w", u.cfg.Target, unix.EINVAL)
		}
	}
	return nil
}

// permitted refuses a branch that lies on a mount served here, and one that is
// another directory for this process than for the client.
func (h *host) permitted(path string, is place) error {
	if err := h.foreign(is.Dev); err != nil {
		return err
	}
	mine, err := placeOf(path)
	if err != nil {
		return fmt.Errorf("the helper does not see the branch: %w", err)
	}
	if mine != is {
		return &os.PathError{Op: "branch", Path: path, Err: fmt.Errorf("the helper, which another process has started, sees another directory there: %w", unix.ESTALE)}
	}
	return nil
}

// openEngine opens the union of branches.
func (u *union) openEngine(r *unionfs.Resume) ([]Repaired, *fusesrv.Watch, error) {
	ec := &unionfs.Config{NoPlink: u.cfg.NoPlink, SumFree: u.cfg.SumFree, Logger: u.h.log, Resume: r}
	for _, b := range u.cfg.Branches {
		p, err := unionfs.ParsePerm(b.Perm)
		if err != nil {
			return nil, nil, err
		}
		ec.Branches = append(ec.Branches, unionfs.BranchSpec{Path: b.Path, Perm: p})
	}
	ec.CopiedUp = func(n *unionfs.Node, _, _ uint64) {
		if s := u.srv.Load(); s != nil {
			s.CopiedUp(n)
		}
	}
	var w *fusesrv.Watch
	if u.mode() == fusesrv.Notify {
		hub, err := u.h.watcher()
		if err != nil {
			return nil, nil, err
		}
		w = fusesrv.NewWatch(hub)
		ec.Watch = w
	}
	var rep []unionfs.Repaired
	var err error
	if u.fs, rep, err = unionfs.Open(ec); err != nil {
		u.fs = nil
		return nil, w, err
	}
	u.watch = w
	var out []Repaired
	for _, r := range rep {
		out = append(out, Repaired(r))
	}
	return out, w, nil
}

func (h *host) watcher() (*watch.Hub, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.hub == nil {
		hub, err := watch.New()
		if err != nil {
			return nil, err
		}
		h.hub = hub
	}
	return h.hub, nil
}

func (u *union) mode() fusesrv.UDBA {
	switch u.cfg.UDBA {
	case "none":
		return fusesrv.None
	case "reval":
		return fusesrv.Reval
	case "strict":
		return fusesrv.Strict
	}
	return fusesrv.Notify
}

// mountConfig is what concerns mount(2).
func (c *Config) mountConfig() *fusesrv.Config {
	return &fusesrv.Config{Target: c.Target, ReadOnly: c.ReadOnly}
}

// serverConfig is what the server needs.
func (u *union) serverConfig() fusesrv.Config {
	c := *u.cfg.mountConfig()
	c.FS, c.UDBA, c.Watch, c.Logger = u.fs, u.mode(), u.watch, u.h.log
	c.State = u.st
	c.Keep = func(id uint64, fd int) error { return u.h.w.Store(u.keptName(id), 0, fd) }
	c.Unkeep = func(id uint64) { u.h.w.DropLater(u.keptName(id)) }
	return c
}

func (u *union) keptName(id uint64) string { return u.name + "/" + strconv.FormatUint(id, 10) }

// meta is what the state has besides that of the server.
type meta struct {
	Version int
	Config  Config
}

func (u *union) setMeta() error {
	b, err := keeper.Marshal(meta{Version, u.cfg})
	if err != nil {
		return err
	}
	return u.st.SetMeta(b)
}

// store gives the keeper what another worker needs. It runs in State.Hand.
func (u *union) store(state *os.File) error {
	return u.h.w.Store(u.name, u.conn, append([]int{u.dev, int(state.Fd())}, u.locks...)...)
}

// hand gives the keeper all of a union that is served. The union itself comes
// last, so that a worker finds it with its files or not at all.
func (u *union) hand() error {
	u.keeping.Lock()
	defer u.keeping.Unlock()
	s := u.srv.Load()
	if u.ended || s == nil || u.st.Err() != nil { // which stateFailed has told
		return nil
	}
	s.KeepAgain()
	var err error
	if s.Device(func() { err = u.st.Hand(u.store) }) != nil {
		return nil // it is about to be released
	}
	return err
}

// storeLocks is store after the branches have changed.
func (u *union) storeLocks() error {
	locks, err := u.fs.Locks()
	if err != nil {
		return err
	}
	taken := false
	err = u.st.Hand(func(state *os.File) error {
		taken = true
		keeper.CloseAll(u.locks)
		u.locks = locks
		return u.store(state)
	})
	if !taken {
		keeper.CloseAll(locks)
	}
	return err
}

// stateFailed is called when the state is not kept any more.
func (u *union) stateFailed(err error) {
	u.h.log.Error("the mount will end with this process", "target", u.cfg.Target, "err", err)
}

// serve begins to serve what is mounted now.
func (u *union) serve(conn int) error {
	u.h.mu.Lock()
	u.conn = conn
	u.h.mu.Unlock()
	s, err := fusesrv.Serve(u.serverConfig(), u.dev)
	if err != nil {
		u.release(u.watch)
		return err
	}
	if err := u.attend(s); err != nil {
		// The client unmounts, and that ends it.
		return err
	}
	return nil
}

// attend makes a server's union known to the keeper, until it ends.
func (u *union) attend(s *fusesrv.Server) error {
	u.srv.Store(s)
	u.st.OnReplace(u.store)
	u.st.OnFail(u.stateFailed)
	err := u.storeLocks()
	go func() {
		<-s.Done()
		if err := u.fs.FlushLinks(); err != nil {
			u.h.log.Warn("flush links", "target", u.cfg.Target, "err", err)
		}
		u.release(nil)
	}()
	return err
}

// giveUp ends what was never mounted.
func (u *union) giveUp() {
	unix.Close(u.dev)
	u.release(u.watch)
}

// release lets the branches go.
func (u *union) release(w *fusesrv.Watch) {
	if w != nil {
		w.Close()
	}
	u.keeping.Lock()
	u.ended = true
	u.keeping.Unlock()
	u.mu.Lock()
	if u.fs != nil {
		if err := u.fs.Close(); err != nil {
			u.h.log.Warn("close", "target", u.cfg.Target, "err", err)
		}
	}
	keeper.CloseAll(u.locks)
	u.locks = nil
	u.mu.Unlock()
	if err := u.h.w.Drop(u.name); err != nil {
		u.h.log.Warn("drop", "err", err)
	}
	if u.st != nil {
		u.st.Close()
	}
	u.h.mu.Lock()
	delete(u.h.unions, u.name)
	u.h.rest()
	u.h.mu.Unlock()
	close(u.done)
}

// alter changes the branches.
func (u *union) alter(req *request) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	s := u.srv.Load()
	select {
	case <-s.Done():
		return errnoNotServed
	default:
	}
	var perm unionfs.Perm
	var err error
	if req.Op != opDelete {
		if perm, err = unionfs.ParsePerm(req.Branch.Perm); err != nil {
			return err
		}
		if req.Op != opModify {
			if err := u.h.permitted(req.Branch.Path, req.Is); err != nil {
				return err
			}
		}
	}
	if req.Retry && u.altered(req, perm) {
		return nil
	}
	s.DropIdle()
	var rep []unionfs.Repaired
	switch req.Op {
	case opInsert:
		rep, err = u.fs.Insert(req.At, unionfs.BranchSpec{Path: req.Branch.Path, Perm: perm})
	case opAppend:
		rep, err = u.fs.Insert(len(u.fs.Branches()), unionfs.BranchSpec{Path: req.Branch.Path, Perm: perm})
	case opModify:
		rep, err = u.fs.Modify(req.Branch.Path, perm)
	case opDelete:
		err = u.fs.Delete(req.Branch.Path)
	}
	for _, r := range rep {
		u.h.log.Warn("repaired", "branch", r.Branch, "path", r.Path, "action", r.Action)
	}
	if err != nil {
		return err
	}
	s.InvalidateAll()
	u.cfg.Branches = nil
	for _, b := range u.fs.Branches() {
		u.cfg.Branches = append(u.cfg.Branches, Branch{b.Path, b.Perm.String()})
	}
	return errors.Join(u.setMeta(), u.storeLocks())
}

// altered reports whether a change of the branches was done already.
func (u *union) altered(req *request, perm unionfs.Perm) bool {
	list := u.fs.Branches()
	at := slices.IndexFunc(list, func(b unionfs.BranchSpec) bool { return b.Path == req.Branch.Path })
	switch req.Op {
	case opDelete:
		return at < 0
	case opInsert:
		return at >= 0 && at == req.At && list[at].Perm == perm
	case opAppend:
		return at >= 0 && at == len(list)-1 && list[at].Perm == perm
	}
	return false // done again it is the same
}

// resume goes on with what earlier workers served. What cannot go on is ended:
// its users get ENOTCONN. An error is for a state that a later version made:
// the keeper then runs the program that did.
func (h *host) resume(items []keeper.Item) error {
	kept := map[string]map[uint64]*os.File{}
	for _, it := range items {
		name, id, ok := strings.Cut(it.Name, "/")
		if !ok {
			continue
		}
		if kept[name] == nil {
			kept[name] = map[uint64]*os.File{}
		}
		if len(it.FDs) == 1 {
			kept[name][number(id)] = os.NewFile(uintptr(it.FDs[0]), "kept")
		}
	}
	for name, files := range kept {
		if !slices.ContainsFunc(items, func(it keeper.Item) bool { return it.Name == name }) {
			// A keeper that was being given all did not get the rest.
			for _, f := range files {
				f.Close()
			}
			if err := h.w.Drop(name); err != nil {
				return err
			}
		}
	}
	for _, it := range items {
		if strings.Contains(it.Name, "/") {
			continue
		}
		h.last = max(h.last, number(it.Name))
		connected := len(it.FDs) > 0 && fusesrv.Connected(it.FDs[0])
		err := h.goOn(it, kept[it.Name])
		if errors.Is(err, fusesrv.ErrLaterState) {
			return err
		}
		if err != nil {
			level := slog.LevelError
			if errors.Is(err, fusesrv.ErrNoResend) {
				level = slog.LevelWarn // it is what such a kernel can do
			}
			h.log.Log(context.Background(), level, "go on", "union", it.Name, "err", err)
			if connected {
				if err := fusesrv.Abort(it.Conn); err != nil {
					h.log.Error("abort", "err", err)
				}
			}
			if err := h.w.Drop(it.Name); err != nil {
				return err
			}
		}
	}
	return nil
}

// goOn goes on with one union. It takes over all descriptors.
func (h *host) goOn(it keeper.Item, kept map[uint64]*os.File) (err error) {
	left := it.FDs // which nobody has taken over yet
	u := &union{h: h, name: it.Name, conn: it.Conn, done: make(chan struct{})}
	begun := false
	defer func() {
		if begun {
			return
		}
		keeper.CloseAll(left)
		for _, f := range kept {
			f.Close()
		}
		if u.st != nil {
			u.st.Close()
		}
	}()
	if len(it.FDs) < 2 {
		return errors.New("no device and state")
	}
	u.dev = it.FDs[0]
	left = append([]int{u.dev}, it.FDs[2:]...)
	if u.st, err = fusesrv.OpenState(os.NewFile(uintptr(it.FDs[1]), "state")); err != nil {
		return err
	}
	var m meta
	// The version alone first: the rest may be something else by then.
	var v struct{ Version int }
	if err := keeper.Unmarshal(u.st.Meta(), &v); err != nil {
		return fmt.Errorf("state: %w", err)
	}
	if v.Version > Version {
		return fmt.Errorf("%w: %d, and this is %d", fusesrv.ErrLaterState, v.Version, Version)
	}
	if err := keeper.Unmarshal(u.st.Meta(), &m); err != nil {
		return fmt.Errorf("state: %w", err)
	}
	u.cfg = m.Config
	r := new(unionfs.Resume)
	for _, fd := range it.FDs[2:] {
		r.Locks = append(r.Locks, os.NewFile(uintptr(fd), "lock"))
	}
	left = left[:1]
	rep, w, err := u.openEngine(r)
	for _, f := range r.Locks {
		if f != nil { // of a branch that was taken away at that moment
			f.Close()
		}
	}
	if err != nil {
		if w != nil {
			w.Close()
		}
		return err
	}
	begun = true
	for _, r := range rep {
		h.log.Warn("repaired", "branch", r.Branch, "path", r.Path, "action", r.Action)
	}
	h.mu.Lock()
	h.unions[u.name] = u
	h.mu.Unlock()
	s, err := fusesrv.Resume(u.serverConfig(), u.dev, kept)
	if err != nil {
		u.release(nil)
		return err
	}
	return u.attend(s)
}
