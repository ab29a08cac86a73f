/*-------------------------------------------------------------------------
 *
 * scan.c
 *	  The plan of a call in FROM.
 *
 * That is how an application begins a request, because it wants the columns of
 * the answer.  The server's node for functions in FROM is made for any number
 * of rows: it copies the row type three times, has a memory context and an
 * expression for each argument, stores the tuple that the function forms, as
 * another form of tuple, in a tuplestore, and gets it back from there.  That
 * is more than half of what it takes to find an answer.
 *
 * A call of ours returns one row.  So the planner is offered a custom scan,
 * which evaluates the call as an expression and takes the columns that the
 * query needs.  The expression does all that belongs to a call: it checks the
 * right to make it, evaluates the arguments, and counts it if functions are
 * tracked.  The row does not become a tuple at all (ResultCallInto() says how).
 *
 * What is left to the server's node, which does it as it always did:
 *
 *	- arguments that depend on other tables of the query, or are computed by
 *	  other parts of its plan.  They can change in the course of the query, and
 *	  the function has to be called again when they did.  Without them it is
 *	  called once, however often its row is read, just as by the server's node,
 *	  and what it leaves in memory can stay until the query ends.
 *	- queries that want the row as a whole, as most do that change or lock rows
 *	  of a table beside it.
 *	- ROWS FROM with more than one function, and WITH ORDINALITY.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "call/result.h"
#include "call/scan.h"
#include "fmgr.h"
#include "nodes/extensible.h"
#include "nodes/makefuncs.h"
#include "nodes/nodeFuncs.h"
#include "optimizer/optimizer.h"
#include "optimizer/paths.h"
#include "optimizer/restrictinfo.h"
#include "utils/lsyscache.h"
#include "utils/ruleutils.h"

/* State of the node; its slot has the columns of its custom_scan_tlist */
typedef struct CallScanState
{
	CustomScanState custom;		/* must be first */
	ExprState  *call;			/* puts its result in row */
	bool		called;
	ResultRow	row;
	int			position;		/* before the row, at it, or behind it */
} CallScanState;

#define BEFORE_ROW	0
#define AT_ROW		1
#define BEHIND_ROW	2

static void offer_call_scan(PlannerInfo *root, RelOptInfo *rel, Index rti,
							RangeTblEntry *rte);
static FuncExpr *get_call(const RangeTblEntry *rte);
static bool is_supported(Oid function);
static bool may_change(Node *node, void *context);
static bool get_columns(const RelOptInfo *rel, List **columns);
static Plan *plan_call_scan(PlannerInfo *root, RelOptInfo *rel,
							CustomPath *path, List *tlist, List *clauses,
							List *custom_plans);
static Node *create_state(CustomScan *scan);
static void begin_scan(CustomScanState *node, EState *estate, int eflags);
static TupleTableSlot *exec_scan(CustomScanState *node);
static TupleTableSlot *next_row(ScanState *node);
static bool recheck_row(ScanState *node, TupleTableSlot *slot);
static void call_function(CallScanState *state);
static void fill_slot(CallScanState *state);
static void end_scan(CustomScanState *node);
static void rescan(CustomScanState *node);
static void explain_scan(CustomScanState *node, List *ancestors,
						 ExplainState *es);

static const CustomPathMethods path_methods = {
	.CustomName = "Idempotency Call",
	.PlanCustomPath = plan_call_scan
};

static const CustomScanMethods scan_methods = {
	.CustomName = "Idempotency Call",
	.CreateCustomScanState = create_state
};

static const CustomExecMethods exec_methods = {
	.CustomName = "Idempotency Call",
	.BeginCustomScan = begin_scan,
	.ExecCustomScan = exec_scan,
	.EndCustomScan = end_scan,
	.ReScanCustomScan = rescan,
	.ExplainCustomScan = explain_scan
};

static set_rel_pathlist_hook_type previous_set_rel_pathlist_hook;

PG_FUNCTION_INFO_V1(idempotency_support);

/*
 * idempotency_support(internal) returns internal
 *
 * Planner support for the calls that return an idempotency_result, as CREATE
 * FUNCTION's SUPPORT names it.  It has no answer to any request of the planner; but it
 * marks the functions whose calls can be scanned, and to ask it makes the
 * planner load the library, before it looks for paths.
 */
Datum
idempotency_support(PG_FUNCTION_ARGS)
{
	PG_RETURN_POINTER(NULL);
}

/*
 * Have the planner ask us for paths.
 */
void
ScanInit(void)
{
	RegisterCustomScanMethods(&scan_methods);

	previous_set_rel_pathlist_hook = set_rel_pathlist_hook;
	set_rel_pathlist_hook = offer_call_scan;
}

/*
 * Offer a scan for a call of ours in FROM, if it can do what the query wants.
 */
static void
offer_call_scan(PlannerInfo *root, RelOptInfo *rel, Index rti,
				RangeTblEntry *rte)
{
	FuncExpr   *call;
	List	   *columns;
	CustomPath *path;

	if (previous_set_rel_pathlist_hook != NULL)
		previous_set_rel_pathlist_hook(root, rel, rti, rte);

	/* what was proven to have no rows must stay without */
	if (IS_DUMMY_REL(rel))
		return;

	call = get_call(rte);
	if (call == NULL || !is_supported(call->funcid) || !ResultIsOf(call) ||
		!bms_is_empty(rel->lateral_relids) ||
		may_change((Node *) call->args, NULL) || !get_columns(rel, &columns))
		return;

	/* as the server's path, but for how */
	path = makeNode(CustomPath);
	path->path = *(Path *) linitial(rel->pathlist);
	path->path.type = T_CustomPath;
	path->path.pathtype = T_CustomScan;
	path->flags = CUSTOMPATH_SUPPORT_PROJECTION |
		CUSTOMPATH_SUPPORT_BACKWARD_SCAN;
	path->custom_private = list_make2(call, columns);
	path->methods = &path_methods;

	/* never worse than the server's, which is all that there was */
	rel->pathlist = list_make1(path);
}

/*
 * The call, if a function is all that an entry of FROM has.
 */
static FuncExpr *
get_call(const RangeTblEntry *rte)
{
	Node	   *expr;

	if (rte->rtekind != RTE_FUNCTION || rte->funcordinality ||
		list_length(rte->functions) != 1)
		return NULL;

	expr = linitial_node(RangeTblFunction, rte->functions)->funcexpr;
	return IsA(expr, FuncExpr) ? (FuncExpr *) expr : NULL;
}

/*
 * Whether a function has our support, by whatever names.
 */
static bool
is_supported(Oid function)
{
	RegProcedure support = get_func_support(function);
	FmgrInfo	flinfo;

	if (!RegProcedureIsValid(support))
		return false;
	fmgr_info(support, &flinfo);
	return flinfo.fn_addr == idempotency_support;
}

/*
 * Whether an expression may have another value later in the same query; a
 * volatile function does not count, because nothing but such a change has it
 * called again.
 */
static bool
may_change(Node *node, void *context)
{
	if (node == NULL)
		return false;
	if (IsA(node, Param))
		return ((Param *) node)->paramkind != PARAM_EXTERN;
	if (IsA(node, Var) || IsA(node, PlaceHolderVar) ||
		IsA(node, SubPlan) || IsA(node, AlternativeSubPlan))
		return true;
	return expression_tree_walker(node, may_change, context);
}

/*
 * The columns that a query needs, each once.  Returns false if it needs the
 * whole row.
 */
static bool
get_columns(const RelOptInfo *rel, List **columns)
{
	List	   *exprs = list_copy(rel->reltarget->exprs);
	List	   *vars;
	ListCell   *lc;

	foreach(lc, rel->baserestrictinfo)
		exprs = lappend(exprs, lfirst_node(RestrictInfo, lc)->clause);

	*columns = NIL;
	vars = pull_var_clause((Node *) exprs, PVC_RECURSE_PLACEHOLDERS);
	foreach(lc, vars)
	{
		if (lfirst_node(Var, lc)->varattno <= 0)
			return false;
		*columns = list_append_unique(*columns, lfirst(lc));
	}
	return true;
}

/*
 * Make the plan node of a path.
 *
 * It is not said to scan the entry of FROM, because a custom scan can only be
 * said to scan a table.  So its target list, and that of the scan, which names
 * the columns of the slot, are all that tells where the columns are from.
 */
static Plan *
plan_call_scan(PlannerInfo *root, RelOptInfo *rel, CustomPath *path,
			   List *tlist, List *clauses, List *custom_plans)
{
	CustomScan *scan = makeNode(CustomScan);
	List	   *columns = lsecond_node(List, path->custom_private);
	ListCell   *lc;

	scan->scan.plan.targetlist = tlist;
	scan->scan.plan.qual = extract_actual_clauses(clauses, false);
	scan->flags = path->flags;
	scan->custom_exprs = list_make1(linitial(path->custom_private));
	scan->methods = &scan_methods;

	foreach(lc, columns)
	{
		TargetEntry *column = makeTargetEntry(lfirst(lc),
											  foreach_current_index(lc) + 1,
											  NULL, false);

		scan->custom_scan_tlist = lappend(scan->custom_scan_tlist, column);
	}

	return &scan->scan.plan;
}

static Node *
create_state(CustomScan *scan)
{
	CallScanState *state = palloc0_object(CallScanState);

	NodeSetTag(state, T_CustomScanState);
	state->custom.methods = &exec_methods;
	return (Node *) state;
}

static void
begin_scan(CustomScanState *node, EState *estate, int eflags)
{
	CallScanState *state = (CallScanState *) node;
	CustomScan *scan = castNode(CustomScan, node->ss.ps.plan);
	FuncExpr   *call = linitial_node(FuncExpr, scan->custom_exprs);

	state->call = ExecInitExpr(ResultCallInto(call, &state->row),
							   &node->ss.ps);
}

static TupleTableSlot *
exec_scan(CustomScanState *node)
{
	return ExecScan(&node->ss, next_row, recheck_row);
}

/*
 * The row, when the scan comes to it in either direction.
 */
static TupleTableSlot *
next_row(ScanState *node)
{
	CallScanState *state = (CallScanState *) node;

	if (ScanDirectionIsForward(node->ps.state->es_direction))
		state->position = Min(state->position + 1, BEHIND_ROW);
	else
		state->position = Max(state->position - 1, BEFORE_ROW);
	if (state->position != AT_ROW)
		return NULL;

	if (!state->called)
		call_function(state);
	fill_slot(state);
	return node->ss_ScanTupleSlot;
}

/*
 * Put in the slot what there is for EvalPlanQual.  It executes a copy of the
 * plan for the new version of a row of another table, and what it needs of a
 * scan that is not of a table it gets from here (ExecScanFetch() in
 * execScan.c).  So the function is called again, as by the server's node.
 */
static bool
recheck_row(ScanState *node, TupleTableSlot *slot)
{
	return next_row(node) != NULL;
}

/*
 * Call the function.  The row that it leaves has to stay until the query ends,
 * for a rescan.
 */
static void
call_function(CallScanState *state)
{
	ScanState  *node = &state->custom.ss;
	MemoryContext old_context;
	bool		isnull;

	/* what it stays if the function is strict, and not called at all */
	ResultNone(&state->row);

	old_context = MemoryContextSwitchTo(node->ps.state->es_query_cxt);
	(void) ExecEvalExpr(state->call, node->ps.ps_ExprContext, &isnull);
	MemoryContextSwitchTo(old_context);

	/* not one of ours, but with our support */
	if (!isnull)
		elog(ERROR, "function has not put its row where it was asked to");
	state->called = true;
}

/*
 * Put the columns of the row that the query needs in the slot.
 */
static void
fill_slot(CallScanState *state)
{
	ScanState  *node = &state->custom.ss;
	List	   *columns = castNode(CustomScan, node->ps.plan)->custom_scan_tlist;
	TupleTableSlot *slot = node->ss_ScanTupleSlot;
	ListCell   *lc;

	ExecClearTuple(slot);
	foreach(lc, columns)
	{
		int			i = foreach_current_index(lc);
		int			column = castNode(Var, lfirst_node(TargetEntry, lc)->expr)->varattno;

		slot->tts_values[i] = state->row.values[column - 1];
		slot->tts_isnull[i] = state->row.nulls[column - 1];
	}
	ExecStoreVirtualTuple(slot);
}

static void
end_scan(CustomScanState *node)
{
	/* all that there is goes with the memory of the query */
}

/*
 * Read the row once more.
 */
static void
rescan(CustomScanState *node)
{
	((CallScanState *) node)->position = BEFORE_ROW;
}

/*
 * Say what is called: the name, and the arguments with VERBOSE, as for the
 * server's node.
 */
static void
explain_scan(CustomScanState *node, List *ancestors, ExplainState *es)
{
	CustomScan *scan = castNode(CustomScan, node->ss.ps.plan);
	FuncExpr   *call = linitial_node(FuncExpr, scan->custom_exprs);
	List	   *context;

	if (!es->verbose)
	{
		ExplainPropertyText("Function", get_func_name(call->funcid), es);
		return;
	}

	context = set_deparse_context_plan(es->deparse_cxt, &scan->scan.plan,
									   ancestors);
	ExplainPropertyText("Function Call",
						deparse_expression((Node *) call, context, false, false),
						es);
}
